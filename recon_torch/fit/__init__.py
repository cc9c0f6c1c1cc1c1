"""The optimisation (Sec. 3.3, A.1), its recovery from setbacks, its quality gates, and the asset it makes."""
