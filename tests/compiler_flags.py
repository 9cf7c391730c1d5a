"""XLA flags of tests: compiling takes most of their time, and what they assert holds for any correct program."""

from importlib.metadata import version

_JAXLIB = tuple(int(part) for part in version("jaxlib").split(".")[:2])

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if _JAXLIB < (0, 11):  # later versions do not know this flag
    QUICK += " --xla_cpu_use_fusion_emitters=false"
# On a busy machine a device may reach a collective late; only one that hangs should end the program. Processes with one
# device and with several share cached programs, since all flags but the number of devices are the same.
QUICK += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
