from med3dinsight_ext.training.launch import quoted


def test_only_values_that_need_quotes_have_them() -> None:
    assert [quoted(value) for value in ("a/b-1.nii", 3, "[1, 2]")] == ["a/b-1.nii", "3", '"[1, 2]"']
