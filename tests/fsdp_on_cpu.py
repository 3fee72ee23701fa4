"""FSDP on the CPU: torch can shard there, but accelerate takes `fsdp` for a wish about GPUs and trains whole copies."""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def shard_on_the_cpu() -> None:
    """Let accelerate do on the CPU, in this process, what it does on GPUs where it is given an FSDP plugin."""
    usual = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        usual(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
