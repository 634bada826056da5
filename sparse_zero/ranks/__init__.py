"""The ranks of a run: their placement, rendezvous, failure detection, logs and stop signals.

Others import from `agreement`, `extension_locks`, `failures`, `link_probe`, `watchdog_client`, `network`, `placement`,
`rank_log`, `rendezvous`, `stop_signals`, `watchdog`.
"""
