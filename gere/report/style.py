"""The style of the page: light and dark, from the width of a phone on."""

STYLE = """
:root{color-scheme:light dark;--text:#1b1f24;--faint:#57606a;--rule:#d0d7de;--back:#fff;--heat:0,114,178;
--c0:#0072b2;--c1:#c04a00;--c2:#00805f;--c3:#a8387f;--c4:#8a6d00;--c5:#2a86b8;--c6:#6a4fc0;--c7:#5b6470}
@media(prefers-color-scheme:dark){:root{--text:#e6edf3;--faint:#9da7b1;--rule:#3a424b;--back:#11151a;
--heat:56,150,220;--c0:#4aa8e0;--c1:#f0803c;--c2:#3cc99b;--c3:#e58cc3;--c4:#e0bb3a;
--c5:#8fd0f5;--c6:#b5a2ff;--c7:#a8b2bd}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:76rem;font:16px/1.5 system-ui,sans-serif;
color:var(--text);background:var(--back)}
h1{font-size:1.6rem;line-height:1.2}h2{font-size:1.2rem;margin-top:2.2rem}
p,li,dd{max-width:44rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.3rem .45rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
th:first-child,td:first-child,.text{text-align:left}
.wide th:first-child{position:sticky;left:0;background:var(--back);max-width:45vw}
.wide th:first-child,.text{white-space:normal;min-width:min(10rem,30vw);overflow-wrap:break-word}
.heat th,.heat td{padding:.3rem}.heat.wide th:first-child{min-width:5rem}
.heat td,.heat thead th+th{text-align:center;min-width:3.2rem}
.heat small{display:block;opacity:.8}
.heat caption,figcaption{text-align:left;font-weight:600;padding:.3rem 0;overflow-wrap:anywhere}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.2rem}
.plots>*{min-width:0}.full{grid-column:1/-1}
figure{margin:0;max-width:38rem}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--faint);font-size:12px}
.grid,.mark,.axis{fill:none;stroke:var(--rule)}.axis{stroke:var(--faint)}.mark{stroke-dasharray:2 4}
.line{fill:none;stroke:var(--c);stroke-width:1.6;stroke-linejoin:round}.dot,.mean,.run{fill:var(--c)}
.bar{fill:none;stroke:var(--c);stroke-width:1.4}
.dashed .line{stroke-dasharray:6 3}
.run{opacity:.5}.mean{stroke:var(--back)}.before{fill:none;stroke:var(--c);stroke-width:1.6}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;padding:0;list-style:none;font-size:.9rem}
.legend i{display:inline-block;width:1.4em;height:0;margin-right:.4em;border-top:3px solid var(--c);
vertical-align:middle}
.legend .dashed i{border-top-style:dashed}
dt{font-weight:600}dd{margin:0 0 .4rem}
.note{color:var(--faint);font-size:.9rem}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}
.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}.c7{--c:var(--c7)}
"""
