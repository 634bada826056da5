"""Commands that start ranks: on this machine, on the hosts of a hostfile, or by Slurm.

Others import from `command`, `devices`, `hostfile`, `launchers`, `local`, `preflight`, `reachability`, `remote`,
`slurm`.
"""
