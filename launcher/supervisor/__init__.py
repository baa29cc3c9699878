"""The child processes of Esper: started, watched, restarted and stopped.

esper        all of it, as one context manager
plan         which processes Esper consists of, and their commands
children     all child processes together, in order
child        one process: restart with back-off, limit of restarts, stop
valkey       the embedded Redis-compatible server
preparation  before the first start: tables, catalogue, demo people
stopping     signals cancel the work of an event loop
ports        a free TCP port
output       one prefixed line after another, and log files
"""
