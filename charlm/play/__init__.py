"""`charlm play`: a local page that shows how a checkpoint writes. An extra: it needs charlm[play].

player.py         a checkpoint, and what is known of its training text: counted pairs, spans
copies.py         which characters of a text repeat a span of train
generation.py     one request: its settings, and the characters with their surprise as they come
guard.py          who may ask: only the page itself, on this machine
server.py         the two addresses, their limits, and the server
page.html         all of the page: no other file, no request to another place
"""
