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


def claim(datastore: Datastore, content: str, note: dict[str, str]) -> versions.VersionClaim:
    return versions.claim_version(versions.open_backend(datastore.url), datastore, content, note)


def put(url: str, name: str, number: int, content: str) -> None:
    folder = Path(url) / name / f"v{number}"
    folder.mkdir(parents=True)
    Manifest(name, content, "", (), (), {}).save(folder)


@given(name=names, number=st.none() | st.integers(1, 10**9 - 1))
def test_a_reference_is_a_name_and_maybe_a_version(name: str, number: int | None) -> None:
    reference = name if number is None else f"{name}@v{number}"
    assert versions.parse_reference(reference) == (name, number)


@pytest.mark.parametrize(
    "wrong",
    ["", "@v1", "a@", "a@1", "a@v", "a@v0", "a@v01", "a@v-1", "a/b", "..", ".a", "a b", "a@v1\n", "ä"],
)
def test_anything_else_is_refused(wrong: str) -> None:
    with pytest.raises(UserError, match=r"^datastore\.name="):
        versions.parse_reference(wrong)


def test_a_url_is_a_folder_a_host_or_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        "me:word@host:/data",
        "host::module",
        "-o:/x",
        "s3://",
        "",
    ):
        with pytest.raises(UserError, match=r"^datastore\.url"):
            versions.open_backend(url)
    with pytest.raises(UserError, match="without a login") as caught:
        versions.open_backend("s3://key:word@bucket/prefix")
    assert "word" not in str(caught.value)


def test_training_from_a_host_is_told_what_it_needs() -> None:
    with pytest.raises(
        UserError,
        match=r"give cluster\.scratch.*datastores fetch a DIR datastore\.url=host:/data, then datastore",
    ) as caught:
        versions.check_readable(versions.open_backend("host:/data"), None, "a")
    assert "\n" not in str(caught.value)
    versions.check_readable(versions.open_backend("host:/data"), "/scratch", "a")


def test_only_what_has_a_manifest_is_there(url: str) -> None:
    assert versions.complete_versions(url, "a") == []
    assert versions.datastore_names(versions.open_backend(url)) == []
    for number in (10, 2, 1):
        put(url, "a", number, "c")
    (Path(url) / "a" / "v3").mkdir()
    put(url, "a", 4, "c")
    (Path(url) / "a" / "v4" / FILE).rename(Path(url) / "a" / "v4" / ".manifest.json.x.tmp")
    (Path(url) / "a" / "v05").mkdir()
    (Path(url) / "empty").mkdir()
    assert versions.complete_versions(url, "a") == [1, 2, 10]
    assert versions.datastore_names(versions.open_backend(url)) == ["a"]


def test_the_newest_the_pinned_or_that_of_the_content_is_opened(url: str) -> None:
    for number, content in ((1, "one"), (2, "two"), (3, "one"), (10, "ten")):
        put(url, "a", number, content)

    def opened(**settings: object) -> int:
        version = versions.open_version(dataclasses.replace(Datastore("a", url), **settings))
        assert version.folder == Path(url) / "a" / f"v{version.number}"
        assert version.name == "a"
        return version.number

    assert opened() == 10
    assert opened(name="a@v2") == 2
    assert opened(version=2) == 2
    assert opened(name="a@v2", version=2, content="two") == 2
    assert opened(content="one") == 3


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"name": "imagnet"}, r"no datastore imagnet in .*: \+stage=pipeline makes it .*; near: imagenet"),
        ({"name": "imagenet@v7"}, r"imagenet@v7 does not exist; complete: v1, v2"),
        ({"version": 0}, r"datastore\.version=0"),
        (
            {"name": "imagenet@v1", "version": 2},
            r"datastore\.name=imagenet@v1 and datastore\.version=2 differ",
        ),
        ({"name": "imagenet@v1", "content": "two"}, r"imagenet@v1 holds other images .*content=two"),
        ({"content": "three"}, r"no version of datastore imagenet \(v1, v2\) has datastore\.content=three"),
        ({"name": "begun"}, r"begun has no complete version yet: \+stage=upload finishes v1"),
        (
            {"url": "/nowhere"},
            r"no datastore imagenet in /nowhere: \+stage=pipeline makes it from the archives$",
        ),
    ],
)
def test_what_is_not_there_is_told(url: str, settings: dict[str, object], line: str) -> None:
    put(url, "imagenet", 1, "one")
    put(url, "imagenet", 2, "two")
    claim(Datastore("begun", url), "one", {})
    with pytest.raises(UserError, match=line) as caught:
        versions.open_version(dataclasses.replace(Datastore("imagenet", url), **settings))
    assert "\n" not in str(caught.value)


def test_a_claim_takes_the_next_number(url: str) -> None:
    first = claim(Datastore("a", url), "one", {"run": "r"})
    assert (first.number, first.complete) == (1, False)
    assert first.path == "a/v1"
    assert versions.complete_versions(url, "a") == []
    assert claim(Datastore("a", url), "two", {}).number == 2
    assert claim(Datastore("a@v9", url), "three", {}).number == 9
    assert claim(Datastore("a", url), "four", {}).number == 10
    assert sorted(path.name for path in (Path(url) / "a").iterdir()) == ["v1", "v10", "v2", "v9"]


def test_the_same_content_finds_its_cut_off_upload_again(url: str) -> None:
    claim(Datastore("a", url), "one", {})
    claim(Datastore("a", url), "two", {})
    assert claim(Datastore("a", url), "one", {}).number == 1
    assert claim(Datastore("a@v2", url), "two", {}).number == 2
    assert claim(Datastore("a@v3", url), "two", {}).number == 3  # the pin is what was asked for


def test_the_same_content_finds_its_complete_version_first(url: str) -> None:
    put(url, "a", 1, "one")
    claim(Datastore("a@v2", url), "one", {})
    found = claim(Datastore("a", url), "one", {})
    assert (found.number, found.complete) == (1, True)


def test_a_version_that_exists_is_never_claimed(url: str) -> None:
    put(url, "a", 1, "one")
    claim(Datastore("a@v2", url), "two", {})
    (Path(url) / "a" / "v3").mkdir()
    (Path(url) / "a" / "v3" / "something").touch()
    for number, state in ((1, "exists"), (2, "is taken"), (3, "is taken")):
        with pytest.raises(UserError, match=rf"a@v{number} {state}.*drop @v{number} for the next one"):
            claim(Datastore(f"a@v{number}", url), "new", {})
    assert claim(Datastore("a", url), "new", {}).number == 4


def test_a_file_in_a_version_s_place_is_told(url: str) -> None:
    (Path(url) / "a").mkdir(parents=True)
    (Path(url) / "a" / "v1").touch()
    with pytest.raises(UserError, match=r"a/v1 is a file where a version belongs"):
        claim(Datastore("a", url), "one", {})
    assert [path.name for path in (Path(url) / "a").iterdir()] == ["v1"]


def test_of_claims_at_once_each_content_gets_its_own_number(url: str) -> None:
    context = multiprocessing.get_context("fork")
    contents = [f"content {i % 6}" for i in range(12)]
    barrier, results = context.Barrier(len(contents)), context.Queue()

    def take(content: str) -> None:
        barrier.wait()
        for _ in range(5):
            results.put((content, claim(Datastore("a", url), content, {}).number))

    processes = [context.Process(target=take, args=(content,)) for content in contents]
    for process in processes:
        process.start()
    pairs = {results.get(timeout=120) for _ in range(5 * len(contents))}
    for process in processes:
        process.join()
    assert len(pairs) == 6
    assert sorted(number for _, number in pairs) == [1, 2, 3, 4, 5, 6]


def test_a_datastore_is_looked_up_without_heavy_imports(url: str) -> None:
    put(url, "a", 1, "one")
    heavy = {"torch", "numpy", "boto3", "filelock", "submitit"}
    code = f"""
import sys
from hpc_imagenet.config import Datastore
from hpc_imagenet.datastore import versions
print(versions.open_version(Datastore("a", {url!r})).number, sorted({heavy} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1 []\n", "")
