"""Settings that are meant by names of other frameworks, by parts of names and by misspelt names."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from hpc_imagenet.errors import did_you_mean

# Names as in torch, timm, Lightning, Hugging Face's Trainer and Slurm; lower case, without _ and -.
_MEANINGS = {
    "model": "arch architecture backbone modelname net network",
    "recipe.epochs": "epoch epochs maxepoch maxepochs nepochs numepochs numtrainepochs",
    "recipe.global_batch": "batch batches batchsize bs globalbatchsize trainbatchsize",
    "recipe.optimizer": "opt optim optimiser",
    "recipe.learning_rate": "baselr initlr learningrate lr maxlr peaklr",
    "recipe.momentum": "beta1",
    "recipe.weight_decay": "decay l2 wd weightdecay",
    "recipe.warmup_epochs": "warmup warmupepochs warmupratio warmupsteps",
    "recipe.label_smoothing": "labelsmoothingfactor smoothing",
    "recipe.schedule": "lrschedule lrscheduler lrschedulertype sched scheduler",
    "recipe.size": "crop cropsize imagesize imgsize imgsz inputsize resolution traincropsize trainsize",
    "recipe.val_size": "evalsize testsize valcropsize valresolution",
    "recipe.val_resize": "resizesize valresizesize",
    "recipe.crop_scale": "minscale rrcscale scale",
    "recipe.flip": "hflip horizontalflip randomflip",
    "recipe.augment": "aa aug augmentation augmentations autoaugment randaugment trivialaugment",
    "recipe.erase": "randomerase randomerasing reprob",
    "recipe.ema": "emadecay modelema",
    "recipe.precision": "amp bf16 dtype fp16 half mixedprecision",
    "recipe.freeze": "freezebackbone frozen linearprobe",
    "model.weights": "checkpoint ckpt imagenetweights init initcheckpoint initweights pretrain pretrained",
    "model.options.dropout": "drop dropout droprate",
    "loader.workers": "dataloadernumworkers numworkers nworkers threads worker workers",
    "train.accumulate": "accum accumulategradbatches accumulation gradaccum gradientaccumulationsteps",
    "seed": "randomseed randomstate rng",
    "cluster.gpus_per_node": "device devices gpu gpus gpuspernode gres ngpu ngpus numdevices numgpus",
    "cluster.nodes": "nnodes node nodes numnodes",
    "cluster.cpus_per_task": "cpu cpus cpuspergpu cpuspertask numcpus",
    "cluster.memory_gb": "mem memory ram",
    "cluster.time": "maxtime timelimit timeout walltime",
    "cluster.partition": "queue",
    "cluster.account": "project",
    "cluster": "executor launcher",
    "dataset.source": "data datadir datapath dataroot datasetpath folder imagefolder path root traindir",
    "dataset.val_fraction": "testsize valfraction validationfraction validationsplit valratio valsplit",
    "datastore.url": "bucket storage store",
    "datastore.name": "datastore version",
    "workspace": "logdir out outdir output outputdir rundir savedir workdir",
}

# What is no setting, and how it is done; names as above.
_NO_SETTINGS = {
    "autoresume resume resumefrom resumefromcheckpoint": "python -m hpc_imagenet retry RUN resumes a run",
    "classes nbclasses nclass nclasses numclass numclasses": "the dataset decides it",
}


def similar_settings(name: str, settings: Collection[str], new_keys: Iterable[str] = ()) -> str:
    """Return `; did you mean: …` for the name of an unknown setting, first by its meaning, then by letters.

    What is no setting has how it is done instead.

    Args:
        name: such as `lr`, `trainer.max_epochs` or `recipe.epoch`; groups in front need not exist.
        settings: full names of all settings and groups.
        new_keys: mappings that take any key, written with a plus.
    """
    last = name.removesuffix(".name").rpartition(".")[2]  # optimizer.name is the optimizer
    plain = last.lower().replace("_", "").replace("-", "")
    for names, instead in _NO_SETTINGS.items():
        if plain in names.split():
            return f"; {instead}"
    meant = [setting for setting, names in _MEANINGS.items() if plain in names.split()]
    meant = [
        f"+{setting}" if setting.rpartition(".")[0] in new_keys else setting
        for setting in meant
        if setting in settings or setting.rpartition(".")[0] in new_keys
    ]
    same = [setting for setting in settings if setting.rpartition(".")[2] == last and setting != name]
    if found := list(dict.fromkeys([*meant, *same]))[:4]:
        return f"; did you mean: {', '.join(found)}"
    return did_you_mean(name, settings)
