"""What ``./up`` is made of: child processes that are started, watched, restarted and stopped.

processes   signals, process groups, whoever was left behind
ports       a free one, said aloud
runtime     the lock on the data directory, and the file that says what runs
output      one prefixed line after another, and log files
child       one process: restart with back-off, crash-loop breaker, stop
plan        which processes Esper consists of
family      all of them together, in order
preparation what happens once before: tables, catalogue, demo people
"""
