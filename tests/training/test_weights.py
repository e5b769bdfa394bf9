import pickle
import resource
from pathlib import Path

import pytest
import torch
from running import forked
from torch import nn

from med3dinsight_ext.training.weights import not_finite, read_weights, renamed, write_torch


def test_a_rename_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"rename must match names .* got '\^vit', which matches"):
        renamed({"a.weight": torch.zeros(1)}, {"^vit": ""})
    with pytest.raises(ValueError, match="rename must keep names apart, but 'b' joins some"):
        renamed({"a": torch.zeros(1), "ab": torch.zeros(1)}, {"b": ""})


def test_renames_are_applied_in_their_order() -> None:
    found = renamed({"a.weight": torch.ones(1), "x": torch.zeros(1)}, {"^a": "b", "^b": "c"})
    assert found == {"c.weight": torch.ones(1), "x": torch.zeros(1)}


@pytest.mark.parametrize("values", [1, 10**4])
def test_weights_that_find_no_room_name_the_fault_and_leave_the_earlier_ones(
    values: int, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    write_torch(path, {"a": torch.zeros(1)})

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))  # bytes
        with pytest.raises(OSError, match="File too large"):
            write_torch(path, {"a": torch.ones(values)})

    with forked(write):
        assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    assert read_weights(path) == {"a": torch.zeros(1)}


def test_what_is_no_weights_is_named_by_its_first_keys(tmp_path: Path) -> None:
    torch.save({f"k{i}": i for i in range(7)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"tensors, got \['k0', 'k1', 'k2', 'k3', 'k4'\] in"):
        read_weights(tmp_path / "a.pt")
    torch.save([torch.zeros(1)], tmp_path / "b.pt")
    with pytest.raises(ValueError, match="must hold named tensors, got list in"):
        read_weights(tmp_path / "b.pt")


def test_only_the_network_of_a_student_is_read(tmp_path: Path) -> None:
    inside = {"network.a": torch.ones(1), "psat.network.b": torch.ones(1)}
    torch.save({"student": inside, "model": 3}, tmp_path / "a.pt")
    assert read_weights(tmp_path / "a.pt") == {"a": torch.ones(1)}
    torch.save({"model": {"network.a": torch.ones(1), "epoch": 2}}, tmp_path / "a.pt")
    assert read_weights(tmp_path / "a.pt") == {"network.a": torch.ones(1)}


class Evil:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path(Evil.mark),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    Evil.mark = str(tmp_path / "executed")
    torch.save({"model": Evil()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match="pretrained must .* broken"):
            read_weights(tmp_path / name)
    assert not Path(Evil.mark).exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.pt", None, "must be a weights file, got no file at"),
        ("a.pt", b"", "must hold weights, got the empty file"),
        ("a.pt", b"PK\x03\x04 not a zip", "must .* broken"),
        ("a.safetensors", b"12345678 no header", "must be readable, got the broken file"),
    ],
)
def test_a_bad_file_is_named(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s)pretrained {message}.*{name}"):
        read_weights(tmp_path / name)


def test_a_cut_off_file_and_a_file_without_tensors_are_errors(tmp_path: Path) -> None:
    torch.save(nn.Conv3d(4, 8, 3).state_dict(), tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"broken .*a\.pt"):
        read_weights(tmp_path / "a.pt")
    torch.save({"epoch": 3}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"hold named tensors, got \['epoch'\] in .*b\.pt"):
        read_weights(tmp_path / "b.pt")
    torch.save({"a": torch.tensor([float("nan")])}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"be finite, got NaN or infinity in \['a'\]"):
        read_weights(tmp_path / "c.pt")


@pytest.mark.parametrize("value", [torch.zeros(1).expand(2), torch.eye(3).to_sparse()])
def test_tensors_that_claim_more_than_they_store_are_named(
    value: torch.Tensor, tmp_path: Path
) -> None:
    torch.save({"sound": torch.ones(2, 3), "large": value}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"store every number, got \['large'\] of .*a\.pt"):
        read_weights(tmp_path / "a.pt")


def test_a_view_of_a_stored_tensor_is_read(tmp_path: Path) -> None:
    torch.save({"part": torch.arange(6.0).view(2, 3)[:, 1:]}, tmp_path / "a.pt")
    assert torch.equal(read_weights(tmp_path / "a.pt")["part"], torch.tensor([[1, 2], [4, 5.0]]))


def test_one_bad_number_makes_a_tensor_not_finite() -> None:
    weights = {"a": torch.tensor([1.0, float("inf")]), "b": torch.ones(2)}
    assert not_finite(weights) == ["a"]
