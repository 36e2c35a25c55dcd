"""`python -m cifar100cli` is `cifar100`."""

from cifar100cli.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
