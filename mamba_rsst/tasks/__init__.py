"""What differs between the tasks of a recipe: one object a task, `TASKS` by name."""

from .base import Task, Workload
from .causal_lm import CausalLM
from .image_classification import ImageClassification


TASKS: dict[str, Task] = {task.name: task for task in (ImageClassification(), CausalLM())}

__all__ = ["TASKS", "Task", "Workload"]
