"""placeholder: see task"""
