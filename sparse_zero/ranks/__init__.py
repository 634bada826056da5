"""The ranks of a run: which one this process is, how they meet, notice a failure, log and stop.

Others import from `agreement`, `extension_locks`, `failures`, `link_probe`, `watchdog_client`, `network`, `placement`,
`rank_log`, `rendezvous`, `stop_signals`, `watchdog`.
"""
