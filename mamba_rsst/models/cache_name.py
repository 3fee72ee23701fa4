"""What the cache is called: `cache`, as in transformers from 5.24 on, and by its old name for those before.

There a Mamba's is `cache_params`: generate() gives it to the forward under that name, and looks for it in what comes
back. Both names work with every version.
"""

import functools
import inspect

from transformers.utils import ModelOutput


OLD_NAME = "cache_params"


def takes_old_name(method):
    """Let a method with a keyword `cache` take it as `cache_params` too. Raises ValueError for both at once."""

    @functools.wraps(method)
    def renaming(self, *args, **kwargs):
        old = kwargs.pop(OLD_NAME, None)
        if old is not None:
            if kwargs.get("cache") is not None:
                raise ValueError("Give one of `cache` and `cache_params`, its name until transformers 5.24, not both.")
            kwargs["cache"] = old
        return method(self, *args, **kwargs)

    # generate() checks against the signature what it is given for the forward.
    signature = inspect.signature(method)
    old = inspect.Parameter(OLD_NAME, inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = sorted([*signature.parameters.values(), old], key=lambda parameter: parameter.kind)
    renaming.__signature__ = signature.replace(parameters=parameters)
    return renaming


class CacheOutput(ModelOutput):
    """Base of the outputs with a field `cache`, which are read by either name."""

    if not hasattr(ModelOutput, OLD_NAME):  # with it, transformers renames by itself, and says so

        @property
        def cache_params(self):
            return self.cache

        def __contains__(self, key):
            return super().__contains__(_new_name(key))

        def __getitem__(self, key):
            return super().__getitem__(_new_name(key))

        def get(self, key, default=None):
            return super().get(_new_name(key), default)


def _new_name(key):
    return "cache" if key == OLD_NAME else key
