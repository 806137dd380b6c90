from .cache import MemoryCache as MemoryCache
