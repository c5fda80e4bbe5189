"""`charlm play`: a local page on which a checkpoint generates text. It needs the extra charlm[play].

player.py         a checkpoint, and what is known of its training text: counted pairs, spans
copies.py         which characters of a text repeat a span of train
generation.py     one request: its settings, and the characters with their surprise as they come
guard.py          refuses requests that do not come from the page itself
server.py         the two addresses, their limits, and the server
page.html         the whole page: it loads no other file and sends nothing elsewhere
"""
