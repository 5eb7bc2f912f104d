"""`python -m spin_reg`."""

from spin_reg.cli import main

if __name__ == "__main__":
    main()
