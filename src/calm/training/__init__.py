"""Recipes, and the Hugging Face Trainer around our networks.

stages.py, finetuning.py        what `calm train` and `calm finetune` do: start reading here
recipe.py, finetuning_recipe.py what recipes say; recipe_settings.py finds the files and what they extend,
                                recipe_files.py reads and writes recipes
check.py, ranges.py, probing.py mistakes in a recipe, found before any work is done
build.py, adapters.py           recipe -> configurations, new networks, adapters
continuing.py, uptraining.py    training that begins with a model, of the same kind or a Transformer
teacher.py                      a Transformer to learn from
extending.py                    runs that are given more steps
opening.py, runs.py, inputs.py  a run's folder: checked, locked, made ready, resumed, finished
blocks.py, batches.py, noise.py what is trained on: blocks of text, batches, the noise of each block
trainer.py, arguments.py        the Trainer, and what it is told
optimizers.py, muon.py          optimizers by name; one of your own is registered here
thinking.py, curriculum.py      thoughts in the place of written steps, stage by stage
checkpoints.py, faults.py       written whole, found again; what can stop a run
overview.py                     what a run is about to do, and how long it should take
precision.py                    float32 or bfloat16, where a recipe leaves it open
speed.py, clock.py, progress.py what is shown and logged meanwhile
trackers.py                     runs of TensorBoard, Weights & Biases, MLflow and trackio
processes.py, sharding.py       several processes, and models spread over them
"""
