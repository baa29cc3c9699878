"""The commands of ``esper``.

On an installation's database, through the services of the apps:

tokens   esper token issue, list, revoke
recipes  esper recipe list, start, stop, resume, logs
audit    esper audit verify, export
backup   esper backup, restore, restored
keys     esper rotate

On a running server, over its REST API (``launcher.remote``):

reading   esper runs, adaptations, inbox, findings, show
deciding  esper approve, reject, rollback, cancel, claim, release, extend
running   esper pause, resume, stop, kill
watching  esper watch
maintaining  esper workers, kernels, blueprints, variants, policy, audit log
channels  esper channels
mcp       esper mcp
asking    the options that name the server and the account
finding   objects by the names that people use
waiting   --wait
"""
