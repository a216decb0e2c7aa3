"""`python -m gradclip` is the program `gradclip`."""

from gradclip.cli import main

if __name__ == "__main__":
    main()
