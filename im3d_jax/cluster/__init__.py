"""A batch on a Ray cluster: one driver, and actors that pull the next asset when they are idle.

events.py     what an actor can tell the driver, and the contract of a crew of actors
nodes.py      which nodes fail, and when one is taken out of use
dispatch.py   which actor gets which asset, and what is tried again; knows no Ray
actor.py      what runs in an actor: a loaded model and its 3D workers
crew.py       a crew of Ray actors: resources, placement, death; the only module that knows Ray
making.py     all of it together, in the place of `jobs.making.InProcess`
"""
