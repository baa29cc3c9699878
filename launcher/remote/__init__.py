"""What the commands over the REST API share; their options are in ``launcher.commands.asking``.

client   requests, errors as sentences, and exit statuses
agent    what an assistant may do over the Model Context Protocol
tables   answers as tables for people, or as JSON
"""
