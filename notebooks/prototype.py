# %% [markdown]
# # From a datastore to a sweep
#
# Look at the images, time the loader, train a backbone for a minute by the sweep's recipe,
# send the sweep, watch it.
# The session's datastore is `datastore/` beside this notebook: `session.datastore=NAME` has put it there.

# %%
import os
from pathlib import Path

import hpc_imagenet
from hpc_imagenet.config.compose import compose
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader

if "HPC_IMAGENET_DATASTORE" not in os.environ:
    raise SystemExit("this session has no datastore: pause it, then resume RUN session.datastore=NAME")
folder = Path(os.environ["HPC_IMAGENET_DATASTORE"]).resolve()  # …/datastores/NAME/vN
store = DatasetReader(folder)

CLUSTER = "auto"  # or your own file: "mine" with CONFIG_DIR = "/…/my-conf"
CONFIG_DIR = None  # absolute path of the folder with your own config files
MODEL = "mobilenet_v3_small"
SETTINGS = [
    f"cluster={CLUSTER}",
    f"dataset={store.manifest.name}",  # it chooses a recipe; add recipe=NAME for another
    f"datastore.url={os.environ['HPC_IMAGENET_DATASTORE_URL']}",  # where the jobs of the sweep find it
    f"datastore.name={folder.parent.name}@{folder.name}",
]
(config,) = compose([*SETTINGS, f"model={MODEL}"], config_dir=CONFIG_DIR)
for name, split in store.manifest.splits.items():
    print(f"{name}: {split.images:,} images of {len(store.manifest.classes)} classes")

# %% [markdown]
# ## How many of each class?

# %%
import numpy as np

counts = np.bincount(store.open_split("train").index["label"], minlength=len(store.manifest.classes))
print(f"between {counts.min():,} and {counts.max():,} images a class, {np.median(counts):,.0f} in the middle")
for category, count in list(zip(store.manifest.classes, counts, strict=True))[:10]:
    print(f"{category.names[0]:24.24} {count:6,} {'▇' * round(40 * count / counts.max())}")

# %% [markdown]
# ## A batch, as the network sees it
# Cropped, resized and mirrored by the recipe.

# %%
from IPython.display import display
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from hpc_imagenet.training.prototype import Prototype

prototype = Prototype(config, store)
images, labels = next(iter(prototype.loader()))
grid = to_pil_image(make_grid(images[:32].cpu(), nrow=8, padding=1, pad_value=255))
scale = max(1, 640 // grid.width)
display(grid.resize((scale * grid.width, scale * grid.height), Image.Resampling.NEAREST))
print(", ".join(store.manifest.classes[label].names[0] for label in labels[:8].tolist()), "…")

# %% [markdown]
# ## How fast is the loader?

# %%
print(f"{prototype.speed(seconds=10):,.0f} images/s with {prototype.loaders.workers} threads")

# %% [markdown]
# ## A minute of training
# The same network, batches and steps as in the sweep; the learning rate has hardly left its warm-up.

# %%
MINUTES = 1

trained = prototype.train(MINUTES)
losses = trained["losses"]
print(f"{len(losses)} steps, {trained['images_per_second']:,.0f} images/s")
print(f"loss {np.mean(losses[:5]):.2f} → {np.mean(losses[-5:]):.2f}")
print(f"top-1 {trained['top1']:.1%} on some images of val")

# %% [markdown]
# ## The sweep
# One job a combination, on the cluster. It goes on when this notebook and the session have ended.

# %%
SWEEP = ["model=resnet18,mobilenet_v3_small", "seed=0"]

sweep = hpc_imagenet.submit([*SETTINGS, *SWEEP], config_dir=CONFIG_DIR)
sweep

# %%
import time

from IPython.display import clear_output

while any(run.state() in ("queued", "running") for run in sweep):
    clear_output(wait=True)
    for run in sweep:
        print(f"{run.id:36} {run.state():9} {run.reason() or run.progress().get('note', '')}")
    time.sleep(2)
clear_output(wait=True)
for run in sweep:
    done = run.state() == "finished"
    print(f"{run.id:36} {run.state():9} {format(run.result()['top1'], '.2%') if done else run.reason()}")
