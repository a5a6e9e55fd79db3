import pytest, time, torch, collections
pytestmark = pytest.mark.comfy
def test_all():
    import families, framewise, registry, parts, comfy.utils
    comfy.utils.PROGRESS_BAR_ENABLED=False
    reg=registry.registry(); ids=sorted(registry.concerned())
    print(len(ids))
    class L(list):
        def append(self,x):
            super().append(x); fh.write('%.1f '%(time.time()-t0)+x+'\n'); fh.flush()
    fh=open('/tmp/oracle/explore2.txt','w'); t0=time.time()
    lines=L()
    for name in ids:
        if name in ('TorchCompileModel',) or name<'ModelMergeSD3_2Z': continue
        t1=time.time()
        node=reg[name]; outs=registry.outputs(node)
        for f in () if 0 else ("SD1.5","Flux","SDXL","SD3","Lumina2"):
            try:
                values=registry.inputs(node,f)
                out=registry.call(node,values)
                got={}
                conds=[]
                for k,v in zip(outs,out):
                    if k=="CONDITIONING": conds.append(v)
                    else: got[k]=v
                pos,neg=registry.plain(f)
                if conds: pos=conds[0]
                if len(conds)>1: neg=conds[1]
                g=got.get("GUIDER") or framewise.cfg(got.get("MODEL") or registry.model(f),pos,neg)
            except Exception as e:
                lines.append(f"{name} | {f} | NODE {type(e).__name__}: {str(e)[:110]!r}"); 
                if isinstance(e,KeyError): break
                continue
            try:
                x=families.latents(f,1)
                o=g.sample(torch.ones_like(x)*.3,x,framewise.comfy.samplers.ksampler("euler"),torch.tensor(families.levels(f,3)),disable_pbar=True,seed=1)
                g2=framewise.cfg(registry.model(f),*registry.plain(f))
                o2=g2.sample(torch.ones_like(x)*.3,x,framewise.comfy.samplers.ksampler("euler"),torch.tensor(families.levels(f,3)),disable_pbar=True,seed=1)
                lines.append(f"{name} | {f} | ok acts {framewise.tiny.rms(o,o2):.1e}")
            except Exception as e:
                lines.append(f"{name} | {f} | SAMPLE {type(e).__name__}: {str(e)[:110]!r}")
