"""`python -m fsa`: what runs here."""

from . import info

if __name__ == "__main__":
    print(info())
