"""Recipes, and the Hugging Face Trainer around our networks.

stages.py, finetuning.py        what `calm train` and `calm finetune` do: start reading here
recipe.py, finetuning_recipe.py the fields of recipes; recipe_settings.py finds files and resolves `extends`,
                                recipe_files.py reads and writes recipes
check.py, ranges.py, probing.py mistakes in a recipe, found before any work is done
build.py, adapters.py           recipe -> configurations, new networks, adapters
continuing.py, uptraining.py    starting from a trained model: continued pre-training, converted Transformers
teacher.py                      a Transformer to learn from (distillation)
extending.py                    runs that are given more steps
opening.py, runs.py, inputs.py  a run's folder: checked, locked, set up, resumed, finished
blocks.py, batches.py, noise.py training data: blocks of text, batches, noise for each block
trainer.py, arguments.py        the Trainer and its arguments
optimizers.py, muon.py          optimizers by name; register your own here
thinking.py, curriculum.py      continuous thoughts in place of written steps, stage by stage
checkpoints.py, faults.py       checkpoints, written atomically and verified; what can stop a run
overview.py                     what a run is about to do, and how long it should take
precision.py                    float32 or bfloat16, if a recipe says `precision: auto`
speed.py, clock.py, progress.py throughput, elapsed time and the progress bar
trackers.py                     runs of TensorBoard, Weights & Biases, MLflow and trackio
processes.py, sharding.py       distributed training: process groups and FSDP2
"""
