"""The front door of training loops: plain PyTorch, Lightning Fabric and Accelerate."""
