"""What a run would take: memory by part, time, energy, and what serving its model can reach.

devices.py          cards, by name or in numbers
stages.py           recipe -> the networks that it trains, as tensors without memory
alive.py, as_gpu.py what is alive while a network runs on such tensors, as it would be on a GPU
memory.py           bytes of a device by part, and the largest microbatch that fits
pace.py             FLOPs, bytes sent, time, energy, and what bounds them
serving.py          cache, rows at once, tokens per second
plan.py             all of it for a recipe; tables.py shows it on a terminal
"""
