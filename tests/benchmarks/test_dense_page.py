from dense import tables


def test_the_page_of_the_dense_pilot_is_written_from_its_results() -> None:
    assert (tables.HERE / "README.md").read_text("utf-8") == tables.readme()
