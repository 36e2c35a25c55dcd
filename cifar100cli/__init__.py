"""Train image classifiers on CIFAR-100: reproduce the published figures, believe them, beat them."""

__version__ = "0.1.0"
