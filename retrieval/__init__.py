"""The candidate-retrieval stage of a recommender: HSTU encoder, Faiss index, gRPC service.

Packages are imported where they are used: importing `retrieval` itself loads neither torch nor faiss.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
