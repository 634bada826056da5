"""The ranks of a run: their placement, rendezvous, failure detection, logs and stop signals.

Others import from `caches`, `collectives`, `compilations`, `extension_locks`, `failures`, `link_probe`, `network`,
`parent_watch`, `placement`, `private_files`, `rank_log`, `rendezvous`, `stop_signals`, `watchdog`, `watchdog_client`.
"""
