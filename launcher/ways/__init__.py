"""How ranks are started: on this machine, on the hosts of a hostfile, or by Slurm.

Others import from `choice`, `command`, `devices`, `hostfile`, `preflight`, `reachability`, `remote`, `slurm`,
`torchrun`.
"""
