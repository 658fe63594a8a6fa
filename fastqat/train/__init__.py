"""The trainer behind ``fastqat train``: an ordinary user of the library, and an example to copy from."""
