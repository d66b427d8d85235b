# %% [markdown]
# # From a datastore to a model
#
# Look at the images, time the loader, train a backbone for a minute by the sweep's recipe,
# send the sweep, watch it, and try the best of its networks.
# The session's datastore is `datastore/` beside this notebook: `session.datastore=NAME` has put it there.

# %%
import hpc_imagenet

store = hpc_imagenet.open_datastore()
small = store["train"][0][0].shape[0] <= 64  # px

CLUSTER = "auto"  # or your own file: "mine" with CONFIG_DIR = "/…/my-conf"
CONFIG_DIR = None  # absolute path of the folder with your own config files
MODEL = "mobilenet_v3_small"
RECIPE = "demo" if small else "standard90"
SETTINGS = [f"cluster={CLUSTER}", *store.settings, f"recipe={RECIPE}"]

for name, images in store.splits.items():
    print(f"{name}: {images:,} images of {len(store.classes)} classes")

# %% [markdown]
# ## How many of each class?

# %%
counts = store["train"].counts()
print(f"between {counts.min():,} and {counts.max():,} images a class")
for category, count in list(zip(store.classes, counts, strict=True))[:10]:
    print(f"{category:24.24} {count:6,} {'▇' * round(40 * count / counts.max())}")

# %% [markdown]
# ## A batch, as the network sees it
# Cropped, resized and mirrored by the recipe.

# %%
prototype = hpc_imagenet.prototype([*SETTINGS, f"model={MODEL}"], store, config_dir=CONFIG_DIR)
print(", ".join(store.classes[label] for label in prototype.batch()[1][:8]), "…")
prototype.sheet(images=32)

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
first, last = trained["losses"][:5], trained["losses"][-5:]
print(f"{len(trained['losses'])} steps, {trained['images_per_second']:,.0f} images/s")
print(f"loss {sum(first) / len(first):.2f} → {sum(last) / len(last):.2f}")
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

# %% [markdown]
# ## The best network
# What it says about some images of val. Then take it home: `export` writes a folder that torchvision, timm or
# onnxruntime load without this package.

# %%
best = max((run for run in sweep if run.state() == "finished"), key=lambda run: run.result()["top1"])
some = store["val"][:5]
predictions = hpc_imagenet.predict(best, [pixels for pixels, _ in some])
for prediction, (_, label) in zip(predictions, some, strict=True):
    guess = prediction["classes"][0]
    print(f"{store.classes[label]:24.24} → {guess['name']:24.24} {guess['probability']:.1%}")

# %%
out = f"export-{best.id}"  # a new folder beside this notebook
print(hpc_imagenet.export(best, out), "has a README.md")
