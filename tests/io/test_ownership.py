"""Who could have written a file, through links as well."""

from __future__ import annotations

from pathlib import Path

from hpc_imagenet.io.ownership import foreign_writer


def test_link_to_nothing_is_own_if_only_this_user_could_make_what_it_leads_to(tmp_path: Path) -> None:
    link, shared = tmp_path / "link", tmp_path / "shared"
    for target in ("me@host.123", tmp_path / "removed" / "kernel", "link"):  # the last leads to itself
        link.symlink_to(target)
        assert foreign_writer(link) == ""
        link.unlink()
    shared.mkdir()
    shared.chmod(0o1777)
    link.symlink_to(shared / "missing" / "file")
    assert foreign_writer(link).startswith(f"other users may write {shared} ")
