"""Commands that work on an installation's database, through the services of the apps.

tokens   esper token issue, list, revoke
recipes  esper recipe list, start, stop, resume, logs
audit    esper audit verify, export
backup   esper backup, restore, restored
keys     esper rotate
"""
