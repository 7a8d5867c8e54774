"""The commands of the command line."""

from collections.abc import Callable

from calm.commands.chatting import chat
from calm.commands.listing import models, recipes
from calm.commands.making import ablate, compare, demo, finetune, prepare, tasks, train
from calm.commands.planning import plan
from calm.commands.sharing import import_published, serve, share
from calm.commands.using import compile_steps, doctor, evaluate, flops, generate

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "prepare": prepare,
    "train": train,
    "finetune": finetune,
    "tasks": tasks,
    "evaluate": evaluate,
    "compare": compare,
    "ablate": ablate,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "compile": compile_steps,
    "import": import_published,
    "share": share,
    "flops": flops,
    "plan": plan,
    "recipes": recipes,
    "models": models,
    "doctor": doctor,
}
