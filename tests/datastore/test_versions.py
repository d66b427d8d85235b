import dataclasses
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_imagenet.config.schema import Datastore
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.manifest import FILE, Manifest
from hpc_imagenet.errors import UserError

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "datastores")


def claim(datastore: Datastore, content: str, owner: dict[str, str]) -> versions.VersionClaim:
    return versions.claim_version(versions.open_backend(datastore.url), datastore, content, owner)


def write_version(url: str, name: str, number: int, content: str) -> None:
    folder = Path(url) / name / f"v{number}"
    folder.mkdir(parents=True)
    Manifest(name, content, "", (), (), {}).save(folder)


@pytest.mark.slow
@given(name=names, number=st.none() | st.integers(1, 10**9 - 1))
def test_parse_reference(name: str, number: int | None) -> None:
    reference = name if number is None else f"{name}@v{number}"
    assert versions.parse_reference(reference) == (name, number)


@pytest.mark.parametrize(
    "wrong",
    ["", "@v1", "a@", "a@1", "a@v", "a@v0", "a@v01", "a@v-1", "a/b", "..", ".a", "a b", "a@v1\n", "ä"],
)
def test_invalid_reference_is_refused(wrong: str) -> None:
    with pytest.raises(UserError, match=r"^datastore\.name="):
        versions.parse_reference(wrong)


@pytest.mark.slow
def test_open_backend_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for url, folder in {
        "/data/stores": "/data/stores",
        "stores": "stores",
        "./odd:name": "odd:name",
        "file:///data/x": "/data/x",
        "file:/data/x": "/data/x",
        "~/x": "/home/me/x",
    }.items():
        assert versions.open_backend(url).folder == Path(folder)
        assert not versions.is_remote(url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for url in ("s3://bucket/prefix", "me@host:/data", "host:data"):
        assert versions.is_remote(url)
        assert versions.open_backend(url).folder is None
    for url in (
        "https://host/data",
        "S3://bucket",
        "me:password@host:/data",
        "host::module",
        "-o:/x",
        "s3://",
        "",
    ):
        with pytest.raises(UserError, match=r"^datastore\.url"):
            versions.open_backend(url)
    with pytest.raises(UserError, match="without credentials") as caught:
        versions.open_backend("s3://key:password@bucket/prefix")
    assert "password" not in str(caught.value)


def test_training_over_ssh_needs_scratch_or_a_fetched_copy() -> None:
    with pytest.raises(
        UserError,
        match=r"set cluster\.scratch.*datastores fetch a DIR datastore\.url=host:/data, then set datastore",
    ) as caught:
        versions.check_readable(versions.open_backend("host:/data"), None, "a")
    assert "\n" not in str(caught.value)
    versions.check_readable(versions.open_backend("host:/data"), "/scratch", "a")


def test_versions_without_a_manifest_are_not_listed(url: str) -> None:
    assert versions.complete_versions(url, "a") == []
    assert versions.datastore_names(versions.open_backend(url)) == []
    for number in (10, 2, 1):
        write_version(url, "a", number, "c")
    (Path(url) / "a" / "v3").mkdir()
    write_version(url, "a", 4, "c")
    (Path(url) / "a" / "v4" / FILE).rename(Path(url) / "a" / "v4" / ".manifest.json.x.tmp")
    (Path(url) / "a" / "v05").mkdir()
    (Path(url) / "empty").mkdir()
    assert versions.complete_versions(url, "a") == [1, 2, 10]
    assert versions.datastore_names(versions.open_backend(url)) == ["a"]


def test_open_version_newest_pinned_or_by_content(url: str) -> None:
    for number, content in ((1, "one"), (2, "two"), (3, "one"), (10, "ten")):
        write_version(url, "a", number, content)

    def open_number(**settings: object) -> int:
        version = versions.open_version(dataclasses.replace(Datastore("a", url), **settings))
        assert version.folder == Path(url) / "a" / f"v{version.number}"
        assert version.name == "a"
        return version.number

    assert open_number() == 10
    assert open_number(name="a@v2") == 2
    assert open_number(version=2) == 2
    assert open_number(name="a@v2", version=2, content="two") == 2
    assert open_number(content="one") == 3


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"name": "imagnet"},
            r"no datastore imagnet in .*: \+stage=pipeline makes it .*; did you mean: imagenet",
        ),
        ({"name": "imagenet@v7"}, r"imagenet@v7 does not exist; complete: v1, v2"),
        ({"version": 0}, r"datastore\.version=0"),
        (
            {"name": "imagenet@v1", "version": 2},
            r"datastore\.name=imagenet@v1 and datastore\.version=2 differ",
        ),
        ({"name": "imagenet@v1", "content": "two"}, r"imagenet@v1 has other images .*content=two"),
        ({"content": "three"}, r"no version of datastore imagenet \(v1, v2\) has datastore\.content=three"),
        ({"name": "partial"}, r"partial has no complete version yet: \+stage=upload finishes v1"),
        (
            {"url": "/nowhere"},
            r"no datastore imagenet in /nowhere: \+stage=pipeline makes it from the archives$",
        ),
    ],
)
def test_missing_version_is_reported(url: str, settings: dict[str, object], line: str) -> None:
    write_version(url, "imagenet", 1, "one")
    write_version(url, "imagenet", 2, "two")
    claim(Datastore("partial", url), "one", {})
    with pytest.raises(UserError, match=line) as caught:
        versions.open_version(dataclasses.replace(Datastore("imagenet", url), **settings))
    assert "\n" not in str(caught.value)


def test_claim_uses_the_next_number(url: str) -> None:
    first = claim(Datastore("a", url), "one", {"run": "r"})
    assert (first.number, first.complete) == (1, False)
    assert first.path == "a/v1"
    assert versions.complete_versions(url, "a") == []
    assert claim(Datastore("a", url), "two", {}).number == 2
    assert claim(Datastore("a@v9", url), "three", {}).number == 9
    assert claim(Datastore("a", url), "four", {}).number == 10
    assert sorted(path.name for path in (Path(url) / "a").iterdir()) == ["v1", "v10", "v2", "v9"]


def test_claim_resumes_the_interrupted_upload_of_the_same_content(url: str) -> None:
    claim(Datastore("a", url), "one", {})
    claim(Datastore("a", url), "two", {})
    assert claim(Datastore("a", url), "one", {}).number == 1
    assert claim(Datastore("a@v2", url), "two", {}).number == 2
    assert claim(Datastore("a@v3", url), "two", {}).number == 3  # a pinned number takes precedence


def test_claim_prefers_the_complete_version_of_the_same_content(url: str) -> None:
    write_version(url, "a", 1, "one")
    claim(Datastore("a@v2", url), "one", {})
    found = claim(Datastore("a", url), "one", {})
    assert (found.number, found.complete) == (1, True)


def test_existing_version_is_never_claimed(url: str) -> None:
    write_version(url, "a", 1, "one")
    claim(Datastore("a@v2", url), "two", {})
    (Path(url) / "a" / "v3").mkdir()
    (Path(url) / "a" / "v3" / "something").touch()
    for number, state in ((1, "exists"), (2, "is claimed"), (3, "is claimed")):
        with pytest.raises(UserError, match=rf"a@v{number} {state}.*drop @v{number} to create the next one"):
            claim(Datastore(f"a@v{number}", url), "new", {})
    assert claim(Datastore("a", url), "new", {}).number == 4


def test_file_instead_of_version_folder_is_reported(url: str) -> None:
    (Path(url) / "a").mkdir(parents=True)
    (Path(url) / "a" / "v1").touch()
    with pytest.raises(UserError, match=r"a/v1 is a file, but the version needs a folder there"):
        claim(Datastore("a", url), "one", {})
    assert [path.name for path in (Path(url) / "a").iterdir()] == ["v1"]


@pytest.mark.slow
def test_concurrent_claims_of_different_content_get_different_numbers(url: str) -> None:
    context = multiprocessing.get_context("fork")
    contents = [f"content {i % 6}" for i in range(12)]
    barrier, results = context.Barrier(len(contents)), context.Queue()

    def claim_repeatedly(content: str) -> None:
        barrier.wait()
        for _ in range(5):
            results.put((content, claim(Datastore("a", url), content, {}).number))

    processes = [context.Process(target=claim_repeatedly, args=(content,)) for content in contents]
    for process in processes:
        process.start()
    pairs = {results.get(timeout=120) for _ in range(5 * len(contents))}
    for process in processes:
        process.join()
    assert len(pairs) == 6
    assert sorted(number for _, number in pairs) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_open_version_without_heavy_imports(url: str) -> None:
    write_version(url, "a", 1, "one")
    heavy = {"torch", "numpy", "boto3", "filelock", "submitit"}
    code = f"""
import sys
from hpc_imagenet.config.schema import Datastore
from hpc_imagenet.datastore import versions
print(versions.open_version(Datastore("a", {url!r})).number, sorted({heavy} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1 []\n", "")
