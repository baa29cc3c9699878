"""The command ``esper``: it starts Esper on one machine, checks the machine, and administers it.

command      the command line
up           ``esper up``
doctor       ``esper doctor``
commands     ``esper token``, ``esper recipe``, ``esper audit``
smoke        ``esper up --smoke``: one adaptation through all processes
supervisor   the processes of Esper: started, watched, restarted, stopped
"""
