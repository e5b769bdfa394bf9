from pathlib import Path

import pytest
import torch
from fakes import FakeTexts
from test_dense import TwoStages
from torch import Tensor, nn
from torch.nn import functional as F

from med3dinsight_ext.models.classifier import grad_cam
from med3dinsight_ext.models.teacher_classifier import TeacherClassifier, TeacherFeatures
from med3dinsight_ext.teachers.teacher import Teacher
from med3dinsight_ext.teachers.towers import ImageTower
from med3dinsight_ext.training.transfer import Transfer

SIZE = (24, 16, 20)


class Bright(ImageTower):
    """Its one layer is the image at a quarter of its size."""

    size, mean, std, fingerprint = 16, (0.0,) * 3, (1.0,) * 3, "bright"

    def load(self) -> nn.Module:
        return nn.Sequential(nn.AvgPool2d(4))

    def embed(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).mean((2, 3))


def classifier(**changes: object) -> TeacherClassifier:
    teacher = Teacher(TwoStages(), FakeTexts())
    given = {"out_channels": 2, "patch_size": SIZE, "spacing": (1, 1, 1), "per_plane": 3}
    return TeacherClassifier(teacher, **(given | changes)).eval()  # type: ignore[arg-type]


def test_features_are_those_of_tissue_alone() -> None:
    features = TeacherFeatures(Teacher(Bright(), FakeTexts()), (1, 1, 1), per_plane=4)
    volume = torch.zeros(1, 1, 16, 16, 16)
    volume[..., 4:12, 4:12, 4:12] = torch.tensor([0.4, 0.8]).repeat_interleave(4)
    mean, spread = features(volume)[0].split(3)
    torch.testing.assert_close(mean, torch.full((3,), 0.6), atol=0.03, rtol=0)
    # Sagittal and coronal slices show both halves; an axial one shows 0.4 or 0.8.
    torch.testing.assert_close(spread, torch.full((3,), 0.2 * 2 / 3), atol=0.03, rtol=0)
    moved = features(volume.roll((4, -4), (2, 4)))[0]
    torch.testing.assert_close(moved, features(volume)[0], atol=0.03, rtol=0)


def test_slices_of_a_volume_do_not_depend_on_the_batch() -> None:
    features = TeacherFeatures(Teacher(TwoStages(), FakeTexts()), (1, 2, 3), per_plane=3)
    volumes = torch.rand(2, 1, *SIZE)
    both = features(volumes)
    assert features.of_slices(volumes).shape == (2, 9, 2 * (6 + 9))
    torch.testing.assert_close(both[1:], features(volumes[1:]))
    assert not torch.allclose(both[0], both[1])


def test_layers_can_be_named() -> None:
    features = TeacherFeatures(Teacher(TwoStages(), FakeTexts()), (1, 1, 1), 2, ["1"])
    assert features(torch.rand(1, 1, *SIZE)).shape == (1, 2 * 9)
    with pytest.raises(ValueError, match="per_plane must be at least 1, got 0"):
        TeacherFeatures(Teacher(TwoStages(), FakeTexts()), (1, 1, 1), 0)


def test_a_networks_features_stand_beside_the_teachers() -> None:
    network = nn.Sequential(nn.Conv3d(1, 5, 4, 4))
    joined, alone = classifier(network=network), classifier()
    volume = torch.rand(2, 1, *SIZE)
    grid = network(volume)
    own = torch.cat([grid.mean((2, 3, 4)), grid.amax((2, 3, 4))], 1)
    torch.testing.assert_close(joined.pooled(volume), torch.cat([alone.pooled(volume), own], 1))
    assert joined(volume).shape == (2, 2)
    assert "network.0.weight" in joined.state_dict()
    assert grad_cam(alone) is None


def test_weights_hold_the_head_and_refuse_another_teacher() -> None:
    trained = classifier()
    assert set(trained.state_dict()) == {"head.weight", "head.bias", "fingerprint"}
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    same = classifier()
    same.load_state_dict(state)
    assert torch.equal(same.head.weight, trained.head.weight)
    for change in ({"per_plane": 2}, {"spacing": (2, 1, 1)}, {"layers": ["0", "1"][::-1]}):
        other = classifier(**change)
        with pytest.raises(RuntimeError, match="teacher, its size .* give the settings of the"):
            other.load_state_dict(state)


def test_a_volume_of_zeros_has_finite_features() -> None:
    assert F.relu(classifier()(torch.zeros(1, 1, *SIZE))).isfinite().all()


def test_pretrained_without_a_network_is_an_error(tmp_path: Path) -> None:
    Transfer(None, None, tmp_path / "r.json").load()
    assert not (tmp_path / "r.json").exists()
    with pytest.raises(ValueError, match="got w.pt and no backbone; add the backbone overlay"):
        Transfer(None, "w.pt", tmp_path / "r.json").load()
