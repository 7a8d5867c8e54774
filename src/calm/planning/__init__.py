"""What a run would cost: memory by part, time, energy, and how fast its model could be served.

devices.py          cards, by name or by their figures
stages.py           recipe -> the networks that it trains, as fake tensors
alive.py, as_gpu.py live memory of a network that runs on fake tensors, as it would be on a GPU
memory.py           bytes per device by part, and the largest microbatch that fits
pace.py             FLOPs, communication, time, energy, and what bounds the speed
serving.py          KV cache, batch size, tokens per second
plan.py             all of it for a recipe; tables.py prints it to a terminal
"""
