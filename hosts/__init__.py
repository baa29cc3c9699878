"""What belongs to one machine. Of Esper it imports the contracts only.

paths      the source tree or the installed package, and the data directory
disk       the space that is free
keyring    the installation's secrets
runtime    the lock on a data directory, and what runs on it
processes  signals, process groups, and processes that a supervisor left behind
redaction  secrets are removed from every log line
"""
