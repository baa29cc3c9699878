"""What the commands over the REST API share; their options are in ``launcher.commands.asking``.

client   requests, errors as sentences, and exit statuses
tables   answers as tables for people, or as JSON
"""
