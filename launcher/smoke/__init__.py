"""``esper up --smoke``: one adaptation, end to end, through the real processes.

run      starts Esper, approves an adaptation, waits for its end, stops Esper
person   a person who signs in and uses the REST API
report   the JSON report, and what counts as a failure
timings  how long a decision, a selection, a compilation and an adaptation took
"""
