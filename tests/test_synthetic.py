"""The drawn data set: its shape, that it is always the same, and that pixels alone do not give it away."""

import numpy as np
import pytest
import torch

from cifar100cli import synthetic


@pytest.fixture(scope="module")
def drawn() -> synthetic.Drawn:
    return synthetic.draw(train_per_class=40, test_per_class=10)


def test_shape_and_balance(drawn: synthetic.Drawn) -> None:
    for (images, labels), per_class in ((drawn.train, 40), (drawn.test, 10)):
        assert images.shape == (100 * per_class, 3, 32, 32)
        assert images.dtype == np.uint8
        assert np.bincount(labels).tolist() == [per_class] * 100
    assert len(set(drawn.classes)) == 100
    assert len(set(drawn.superclasses)) == 20
    assert np.bincount(drawn.superclass_of).tolist() == [5] * 20


def test_always_the_same(drawn: synthetic.Drawn) -> None:
    again = synthetic.draw(train_per_class=40, test_per_class=10)
    np.testing.assert_array_equal(again.train[0], drawn.train[0])
    np.testing.assert_array_equal(again.test[1], drawn.test[1])


def test_no_image_stands_in_both_splits(drawn: synthetic.Drawn) -> None:
    training = {image.tobytes() for image in drawn.train[0]}
    assert len(training) == len(drawn.train[0])
    assert not training & {image.tobytes() for image in drawn.test[0]}


def test_a_linear_model_on_pixels_stays_near_chance(drawn: synthetic.Drawn) -> None:
    """Ridge regression onto the classes, in closed form: the best that single pixels can say."""

    def features(images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> torch.Tensor:
        pixels = torch.from_numpy(images).reshape(len(images), -1).float().div(255)
        return (pixels - pixels.mean(1, keepdim=True)) / pixels.std(1, keepdim=True)

    inputs, labels = features(drawn.train[0]), torch.from_numpy(drawn.train[1])
    targets = torch.nn.functional.one_hot(labels, 100).float()
    weights = torch.linalg.solve(inputs.T @ inputs + 1e4 * torch.eye(inputs.shape[1]), inputs.T @ targets)
    predicted = (features(drawn.test[0]) @ weights).argmax(1).numpy()
    assert (predicted == drawn.test[1]).mean() < 0.06
