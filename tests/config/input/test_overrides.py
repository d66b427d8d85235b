"""Settings as typed in a shell: paths, quotes, keys given twice, and lists of files."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml
from command_line import Cli
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from sample_images import encoded

from hpc_imagenet.config.compose import compose, with_overrides
from hpc_imagenet.config.input.overrides import quote_paths, quoted_form, with_defaults
from hpc_imagenet.errors import UserError

NAMED = ("dataset=ilsvrc", "dataset.name=x")
TYPED = (
    "/data/a=b",
    "/data/my birds",
    "/data/birds, 2020 (1)",
    '/data/it\'s "new"',
    "/data/café/ψ/日本",
    "/data/[x]={y}",
    "/data/#1 %20&;!?*|",
    "/data/c:\\d\\",
    "/data/$HOME `x`",
    "/data/'quoted'",
    "/data/ends with a space ",
    "/data/null",
    "/data/x,y=z",
)


def source(*overrides: str, multirun: bool = False) -> str:
    (config,) = compose([*NAMED, *overrides], multirun)
    return config.dataset.source


@pytest.mark.slow
@pytest.mark.parametrize("multirun", [False, True])
@pytest.mark.parametrize("path", TYPED)
def test_a_path_is_taken_as_typed(path: str, multirun: bool) -> None:
    assert source(f"dataset.source={path}", multirun=multirun) == path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["true", "1e3", "007", "[a]", "a=b", "(x)", "range(3)"])
def test_a_relative_path_is_text(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source(f"dataset.source={name}") == str(tmp_path / name)


@pytest.mark.slow
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="$,"), min_size=1))
def test_any_text_after_a_slash_is_the_path(text: str) -> None:
    for path in (f"/data/{text}", f"/data/birds,{text}x"):
        (word,) = quote_paths([f"dataset.source={path}"])
        if not OverridesParser.create().parse_override(word).is_sweep_override():  # such as birds,/x
            assert OverridesParser.create().parse_override(word).value() == path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("dataset.source='/data/my birds, 2020'", "/data/my birds, 2020"),
        ('dataset.source="/data/a=b"', "/data/a=b"),
        ("dataset.source=${dataset.name}/y z", "x/y z"),
        ("dataset.source=~/birds", str(Path.home() / "birds")),
    ],
)
def test_hydra_quotes_interpolations_and_home_still_work(
    word: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert source(word) == str(tmp_path / expected)


@pytest.mark.slow
def test_null_and_other_text_keep_their_meaning() -> None:
    hint = "it's (not) for all; see é"
    (config,) = compose(["model.weights=null", "download.login=null", f"dataset.hint={hint}"])
    assert config.model.weights is None
    assert config.download.login is None
    assert config.dataset.hint == hint


@pytest.mark.slow
def test_commas_between_paths_are_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sources(text: str) -> list[str]:
        configs = compose([*NAMED, f"dataset.source={text}", "seed=0,1"], multirun=True)
        return list(dict.fromkeys(config.dataset.source for config in configs))

    monkeypatch.chdir(tmp_path)
    assert sources("/a b,/c=d, /é") == ["/a b", "/c=d", "/é"]
    assert sources("a,b") == [str(tmp_path / name) for name in "ab"]
    (tmp_path / "a,b").mkdir()
    assert sources("a,b") == [str(tmp_path / "a,b")]
    weights = compose(["model.weights=null,IMAGENET1K_V2"], multirun=True)
    assert [config.model.weights for config in weights] == [None, "IMAGENET1K_V2"]
    with pytest.raises(UserError, match=r"dataset.source=/a,/b is a sweep: add -m .*source='/a,/b'\""):
        source("dataset.source=/a,/b")


@pytest.mark.slow
def test_a_source_of_many_characters_is_read(cli: Cli) -> None:
    folder = cli.cwd / 'it\'s "my" birds, 2020 (a=b) #1 50% é'
    for split in ("train", "val"):
        for wnid in ("n00000001", "n00000002"):
            (folder / split / wnid).mkdir(parents=True)
            (folder / split / wnid / "a.jpg").write_bytes(encoded())
    words = ("+stage=download", *NAMED, f"dataset.source={folder}", "cluster=foreground")
    cli(*words, f"workspace={cli.cwd}/work, here=é's")
    assert (cli.cwd / "work, here=é's" / "archives" / "x" / "ILSVRC2012_img_val.tar").is_file()
    assert yaml.safe_load(cli("--cfg", "job", *words[:-1]).stdout)["dataset"]["source"] == str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "form"),
    [
        ("dataset.source='/data/a b", "\"dataset.source='/data/a b'\""),
        ("cluster.setup=[module load a; b, c's]", "\"cluster.setup=['module load a; b','c\\'s']\""),
        ("+cluster.sbatch.comment=it's", "\"+cluster.sbatch.comment='it\\'s'\""),
        ("cluster.partition=gpu,cpu", "\"cluster.partition='gpu,cpu'\""),
        ("+model.options.x=a:b&c", "\"+model.options.x='a:b&c'\""),
    ],
)
def test_the_error_of_a_quoting_mistake_shows_the_quoted_form(word: str, form: str) -> None:
    with pytest.raises(UserError) as caught:
        compose([word])
    assert form in str(caught.value)
    (typed,) = shlex.split(form)
    compose([typed])


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a $HOME", 'say "x"', "`x`", "it's", "plain!"])
def test_quoted_form_passes_a_shell_unchanged(text: str) -> None:
    (typed,) = shlex.split(quoted_form(f"dataset.hint={text}"))
    (config,) = compose([typed])
    assert config.dataset.hint == text


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["model=[resnet18,resnet50]"],
            "model=[resnet18,resnet50] is a list of files of conf/model: write one of them, "
            "or -m model=resnet18,resnet50 for a run with each",
        ),
        (["model=[resnet18]"], "model=[resnet18] is a list of files of conf/model: write model=resnet18"),
        (
            ["cluster=[local,slurm]"],
            "cluster=[local,slurm] is a list of files of conf/cluster: write cluster=local or cluster=slurm",
        ),
        (
            ["recipe={epochs:3}"],
            "recipe={epochs:3} is no file of conf/recipe: set recipe=NAME, and single values as "
            "recipe.SETTING=VALUE",
        ),
        (
            ["+stage=download", "+stage=process"],
            "+stage=download and +stage=process set stage twice: write one of them, or +stage=pipeline for "
            "download, process, upload and train",
        ),
        (
            ["seed=1", "model=resnet18", "seed=2"],
            "seed=1 and seed=2 set seed twice: write one of them, or -m seed=1,2 for a run with each",
        ),
        (["wait=1", "wait=false"], "wait=1 and wait=false set wait twice: write wait=1 or wait=false"),
        (
            ["cluster=auto", "cluster=local"],
            "cluster=auto and cluster=local set cluster twice: write cluster=auto or cluster=local",
        ),
        (["datastore.url=s3://a", "datastore.url=s3://b"], "datastore.url is set twice: write one of them"),
        (["+model=resnet18"], "+model=resnet18 adds a second model: write model=resnet18"),
        (["++stage=upload"], "++stage=upload adds a second stage: write +stage=upload"),
        (["+seed=1"], "seed is set already: write seed=VALUE, without +"),
        (
            ["model=null"],
            "model=null is no file of conf/model: set model=NAME, and single values as model.SETTING=VALUE",
        ),
        (
            ["datastore=birds"],
            "datastore=birds is unknown; one of: folder, s3, ssh; a name is datastore.name=birds",
        ),
        (
            ["dataset=/data/my birds"],
            "dataset=/data/my birds is no file of conf/dataset: write dataset=images dataset.name=my-birds "
            "'dataset.source=/data/my birds'",
        ),
        (
            ["dataset=./birds, 2020 (1)"],
            "dataset=./birds, 2020 (1) is no file of conf/dataset: write dataset=images "
            "dataset.name=birds-2020-1 'dataset.source=./birds, 2020 (1)'",
        ),
        (
            ["+stage=pipeline", "dataset=ilsvrc", "dataset.source=/data/birds"],
            "dataset.name is not set: add dataset.name=birds",
        ),
    ],
)
def test_what_is_ambiguous_is_refused_with_the_form_that_was_meant(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(overrides)
    assert str(caught.value) == line


def test_lists_are_refused_within_a_sweep_too() -> None:
    with pytest.raises(UserError, match=r"is a list of files of conf/model"):
        compose(["model=[resnet18,resnet50],vgg11"], multirun=True)


@pytest.mark.slow
def test_the_same_value_twice_is_accepted() -> None:
    (config,) = compose(["seed=3", "seed=3", "+stage=upload", "+stage=upload"])
    assert (config.seed, config.stage.name) == (3, "upload")


@pytest.mark.slow
def test_with_overrides_refuses_a_setting_given_twice() -> None:
    (config,) = compose(["+stage=session"])
    with pytest.raises(UserError, match=r"session.gpus=1 and session.gpus=2 set session.gpus twice"):
        with_overrides(config, ["session.gpus=1", "session.gpus=2"])


def test_with_defaults_drops_what_is_given() -> None:
    defaults = ("+stage=pipeline", "model=a,b", "wait=true")
    assert with_defaults(defaults, ["model=c", "stage=train"]) == ["wait=true", "model=c", "stage=train"]
    assert with_defaults(defaults, []) == list(defaults)


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (("dataset.source=/my", "birds"), "to dataset.source, quote both: 'dataset.source=/my birds'"),
        (("train",), "did you mean: +stage=train"),
        (("-m", "seed=1,", "2"), "did you mean: seed=1,2, without spaces"),
        (("recipe.epochs", "=", "3"), "did you mean: recipe.epochs=VALUE, without spaces"),
        (("model=resnet18,", "-m"), "model=resnet18, ends with a comma: write the values without spaces"),
        (("workspace=/x", "jobs"), "jobs is a command, which comes first: python -m hpc_imagenet jobs …"),
        (("--lr", "0.1"), "did you mean: recipe.learning_rate"),
        (("--batch-size=64",), "did you mean: recipe.global_batch"),
    ],
)
def test_words_that_are_no_settings_name_the_form_that_was_meant(
    cli: Cli, words: tuple[str, ...], fragment: str
) -> None:
    assert fragment in cli.refused(*words)
