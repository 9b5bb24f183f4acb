"""The page's style: system fonts, light and dark, one column on a phone, no fixed widths, printable."""

STYLE = """
:root { --ink: #1b1d21; --quiet: #5a616b; --line: #d5d9df; --back: #ffffff; --box: #f4f6f8; --one: #0b57a4;
  --two: #a8460f; --three: #6b7280; --four: #0f766e; --five: #86198f }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --quiet: #a4abb6; --line: #3a3f47; --back: #15171a;
  --box: #1f2226; --one: #7db8f5; --two: #f0a070; --three: #9aa2ad; --four: #5eead4; --five: #e9a0f5 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  -webkit-text-size-adjust: 100% }
header, main { max-width: 68rem; margin: 0 auto; padding: 1.25rem 1rem 0 }
main { padding: 0 1rem 3rem }
a { color: var(--one) }
a:focus-visible, summary:focus-visible { outline: 2px solid var(--one); outline-offset: 2px }
nav ul { list-style: none; margin: .75rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .15rem 1rem }
nav a { display: inline-block; padding: .2rem 0 }
h1 { font-size: 1.7rem; margin: 0; font-weight: 400; overflow-wrap: anywhere }
h1 span { font-weight: 700 }
h2 { font-size: 1.25rem; margin: 2.25rem 0 .5rem; padding-top: .5rem; border-top: 2px solid var(--line) }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere }
p { margin: .4rem 0; max-width: 46rem }
.quiet { color: var(--quiet) }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .75rem; margin: .75rem 0 }
.cards div { background: var(--box); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem }
.cards dt { color: var(--quiet); font-size: .9rem }
.cards dd { margin: 0 }
.cards strong { display: block; font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums }
.cards span { font-size: .85rem; color: var(--quiet) }
.notes { max-width: 46rem; font-size: .92rem }
.notes dt { font-weight: 600; margin-top: .5rem }
.notes dd { margin: 0; overflow-wrap: anywhere }
.scroll { position: relative; overflow-x: auto; margin: .75rem 0 1.25rem; max-width: 100% }
.scroll:focus-visible { outline: 2px solid var(--one) }
table { border-collapse: separate; border-spacing: 0; font-size: .92rem }
caption { text-align: left; font-weight: 600; padding: .25rem 0 }
caption div { position: sticky; left: 0; width: max-content; max-width: calc(100vw - 2rem) }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; text-align: left }
th { font-weight: 600 }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--line) }
tbody th { font-weight: 400; position: sticky; left: 0; background: var(--back);
  padding-right: 1rem; min-width: 6.5rem }
.numbers td { font-variant-numeric: tabular-nums; white-space: nowrap }
.numbers thead th + th { min-width: 4.2rem }
.wrap { display: block; white-space: normal; min-width: 13rem; max-width: 26rem }
.texts td { min-width: 8rem; overflow-wrap: anywhere }
.tables table { width: 100% }
td small, th small { display: block; color: var(--quiet); font-size: .8rem; font-weight: 400; white-space: nowrap }
.chain { list-style: none; padding: 0 0 0 1.4rem; margin: .5rem 0 1rem; display: flex; flex-wrap: wrap;
  gap: .5rem 1.6rem }
.chain li { position: relative; background: var(--box); border: 1px solid var(--line); border-radius: .5rem;
  padding: .35rem .6rem; max-width: 100% }
.chain li + li::before { content: "→"; position: absolute; left: -1.35rem; top: .6rem; color: var(--quiet) }
.chain strong, .chain code, .chain small { display: block }
.chain strong { font-weight: 600 }
.chain code { color: var(--quiet) }
.chain small { color: var(--quiet); font-size: .8rem }
.chain .end-of-chain { border-color: var(--one); border-width: 2px }
details { margin: .75rem 0 }
summary { cursor: pointer; padding: .25rem 0 }
.changes { padding-left: 1.2rem }
.changes li { margin: .2rem 0 }
.runs dt { font-weight: 600; margin-top: .5rem }
.runs dd { margin: 0; overflow-wrap: anywhere }
code { font: .85em ui-monospace, monospace }
ul { padding-left: 1.2rem }
li { overflow-wrap: anywhere }
.tables { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 0 2rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1rem }
.pair { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: flex-start }
.pair > * { flex: 1 1 20rem; min-width: 0 }
figure { margin: .5rem 0; max-width: 27rem }
figcaption { font-size: .92rem; font-weight: 600; padding: .25rem 0 }
svg { display: block; width: 100%; height: auto }
svg text { fill: var(--ink); font: 11.5px system-ui, sans-serif; paint-order: stroke; stroke: var(--back);
  stroke-width: 3px }
svg .end { text-anchor: end }
svg .middle { text-anchor: middle }
svg .grid { stroke: var(--line); stroke-width: 1 }
svg .thin { stroke: var(--one); stroke-width: .8; opacity: .55; fill: none }
svg .thick { stroke: var(--one); stroke-width: 2; fill: none }
svg .series1 { stroke: var(--two); stroke-dasharray: 6 3 }
svg .series2 { stroke: var(--three); stroke-dasharray: 2 3 }
svg .series3 { stroke: var(--four); stroke-dasharray: 10 3 2 3 }
svg .series4 { stroke: var(--five); stroke-dasharray: 1 5 }
svg .faint { opacity: .6 }
svg .mark-line { stroke: var(--two); stroke-width: 1.5; stroke-dasharray: 4 3 }
svg .mark-head { fill: var(--two) }
svg .mark { fill: var(--one) }
svg .hollow { fill: var(--back); stroke: var(--one); stroke-width: 2 }
@media print { body { font-size: 10pt } nav { display: none } main, header { max-width: none; padding: 0 }
  .scroll { overflow: visible } tbody th { position: static }
  figure, tr, .cards div, .chain li { break-inside: avoid } h2, h3, caption { break-after: avoid } }
"""
