#include <cstdio>
#include <cstdlib>
#include <cmath>
#include <vector>
#include <algorithm>
#include <string>
#include <cstring>
#include <cuda_runtime.h>
#define PROTOTYPE
#include "wgmma_sm90.cu"
#define CK(x) do{cudaError_t e_=(x); if(e_!=cudaSuccess){printf("CUDA %s line %d: %s\n",#x,__LINE__,cudaGetErrorString(e_)); exit(1);} }while(0)

template <u32 N,u32 WGS,u32 SL,u32 D,int B> __global__ void __launch_bounds__(WGS*128,B) kern(const __grid_constant__ WgmmaArgs args){ wgmma_linear<Fp16,N,false,WGS,SL,D>(args); }
__host__ __device__ inline u32 hash(u64 v){ v^=v>>33; v*=0xff51afd7ed558ccdULL; v^=v>>33; v*=0xc4ceb9fe1a85ec53ULL; v^=v>>33; return (u32)v; }
__device__ u32 code_at(u64 seed,u32 n,u32 k){ return hash(seed*0x9E3779B97F4A7C15ULL + ((u64)n<<32|k)) & 15; }
__device__ u32 zero_at(u64 seed,u32 n,u32 g){ return hash(~seed*0x9E3779B97F4A7C15ULL + ((u64)n<<32|g)) & 15; }
__device__ u16 scale_at(u64 seed,u32 n,u32 g){ u32 h=hash((seed+77)*0x9E3779B97F4A7C15ULL + ((u64)n<<32|g)); return Fp16::from_float(0.002f+0.01f*(h&1023)/1024.0f); }
__device__ float x_at(u64 seed,u32 m,u32 k){ u32 a=hash(seed*31+((u64)m<<32|k)), b=hash(seed*37+5+((u64)m<<32|k)); float u=(a+1.0f)/4294967808.0f, v=b/4294967296.0f; return sqrtf(-2*logf(u))*cospif(2*v); }
__global__ void make_units(u8* units,u64 seed,u32 stripes,u32 ku,u32 n,u32 k,u32 groups,bool asym){
  u32 ub=unit_bytes(groups,asym); u64 id=blockIdx.x; u32 stripe=id/ku, u=id%ku; u8* p=units+id*ub;
  for(u32 w=threadIdx.x;w<512;w+=blockDim.x){ u32 frag=w/128,l=(w/4)%32,s=w%4,h=frag/2,f=frag%2,r=l/4,t=l%4; u32 word=0;
    for(u32 reg=0;reg<4;++reg) for(u32 half=0;half<2;++half){ u32 nn=stripe*32+h*16+r+(reg&1)*8; u32 kk=u*128+64*f+32*(s/2)+8*t+4*(s%2)+(reg/2)*2+half; u32 c= (nn<n&&kk<k)?code_at(seed,nn,kk):8; word|=c<<(4*reg+16*half);} ((u32*)p)[w]=word; }
  for(u32 i=threadIdx.x;i<groups*32;i+=blockDim.x){ u32 g=i/32,r=(i%32)/4,j=i%4; u32 nn=stripe*32+8*j+r; u32 gg=u*groups+g; ((u16*)(p+2048))[i]= nn<n?scale_at(seed,nn,gg):0; if(asym) p[2048+groups*64+i]=nn<n?zero_at(seed,nn,gg):0; }
}
template<class H> __global__ void make_x(u16* x,u32 m,u32 k,u64 seed){ for(u32 i=blockIdx.x*blockDim.x+threadIdx.x;i<m*k;i+=gridDim.x*blockDim.x) x[i]=H::from_float(x_at(seed,i/k,i%k)); }
template<class H> __global__ void ref(double* y,double* a,const u16* x,u64 seed,u32 m,u32 n,u32 k,u32 gs,bool asym){ u32 nn=blockIdx.x; for(u32 t=0;t<m;++t){ double s=0,ab=0; for(u32 kk=threadIdx.x;kk<k;kk+=32){ double w=(double)Fp16::to_float(scale_at(seed,nn,kk/gs))*((double)code_at(seed,nn,kk)-(asym?zero_at(seed,nn,kk/gs):8)); double v=(double)H::to_float(x[(u64)t*k+kk])*w; s+=v; ab+=fabs(v);} for(int o=16;o;o/=2){ s+=__shfl_xor_sync(~0u,s,o); ab+=__shfl_xor_sync(~0u,ab,o);} if(threadIdx.x==0){ y[(u64)t*n+nn]=s; a[(u64)t*n+nn]=ab; } } }
static float h2f(u16 h,bool bf){ if(bf){u32 v=(u32)h<<16; float f; memcpy(&f,&v,4); return f;} u32 s=h>>15,e=(h>>10)&31,m=h&1023; double v= e==0? ldexp(m,-24): e==31? INFINITY: ldexp(1024+m,e-25); return s?-v:v; }


struct Var{ const char* name; void(*f)(WgmmaArgs); u32 N,wgs,sl,depth; };
static cudaStream_t st;
static size_t smem_of(const Var& v,u32 ku){ size_t s=128+(size_t)v.wgs*v.depth*2*2112+128; s+=(size_t)((ku+v.sl-1)/v.sl)*128*v.N*2; s+=(size_t)v.wgs*64*(v.N+2)*4; return s; }
static bool launch(const Var& v,const WgmmaArgs& a,bool pdl,bool die=true){
  cudaLaunchConfig_t c={}; u32 stripes=(a.n+31)/32; u32 per=v.wgs*2; c.gridDim=dim3((stripes+per-1)/per*v.sl); c.blockDim=dim3(v.wgs*128); c.dynamicSmemBytes=smem_of(v,a.k_units); c.stream=st;
  cudaLaunchAttribute at[2]; int na=0; if(v.sl>1){ at[na].id=cudaLaunchAttributeClusterDimension; at[na].val.clusterDim.x=v.sl; at[na].val.clusterDim.y=1; at[na].val.clusterDim.z=1; na++; }
  if(pdl){ at[na].id=cudaLaunchAttributeProgrammaticStreamSerialization; at[na].val.programmaticStreamSerializationAllowed=1; na++; }
  c.attrs=at; c.numAttrs=na; cudaError_t e=cudaLaunchKernelEx(&c,v.f,a); if(e!=cudaSuccess){ if(die) printf("launch: %s\n",cudaGetErrorString(e)); cudaGetLastError(); return false;} return true; }
int main(){ CK(cudaSetDevice(0)); CK(cudaStreamCreate(&st));
 #define VV(N,W,S,D,B) {"N" #N " wg" #W " sl" #S " d" #D,kern<N,W,S,D,B>,N,W,S,D}
 std::vector<Var> vars={VV(16,2,1,4,2),VV(16,2,2,4,2),VV(16,2,4,4,2),VV(16,2,8,4,2),VV(16,4,4,4,1),VV(16,4,8,4,1),VV(16,1,4,4,4),VV(16,1,8,4,4),VV(16,1,2,4,4),VV(64,2,4,4,2),VV(64,2,8,4,2),VV(64,4,8,4,1),VV(64,4,4,3,1),VV(64,1,8,4,3),VV(64,1,4,4,3)};
 for(auto&v:vars) CK(cudaFuncSetAttribute(v.f,cudaFuncAttributeMaxDynamicSharedMemorySize,227*1024));
 struct C{u32 k,n,m;}; std::vector<C> cs={{4096,4096,16},{4096,4096,64},{8192,1000,13},{640,72,5},{4096,11008,61}}; int bad=0,good=0;
 for(auto&v:vars) for(auto&c:cs){ if(c.m>v.N) continue; u32 ku=(c.k+127)/128, stripes=(c.n+31)/32; if(smem_of(v,ku)>227*1024) continue; u8*units; CK(cudaMalloc(&units,(size_t)stripes*ku*2112)); u16 *x,*y; double*r,*ab; CK(cudaMalloc(&x,c.m*c.k*2)); CK(cudaMalloc(&y,c.m*c.n*2)); CK(cudaMalloc(&r,c.m*c.n*8)); CK(cudaMalloc(&ab,c.m*c.n*8)); u64 seed=c.k*7+c.n+c.m;
   make_units<<<stripes*ku,128,0,st>>>(units,seed,stripes,ku,c.n,c.k,1,false); make_x<Fp16><<<64,256,0,st>>>(x,c.m,c.k,seed); ref<Fp16><<<c.n,32,0,st>>>(r,ab,x,seed,c.m,c.n,c.k,128,false); CK(cudaMemsetAsync(y,0xFF,c.m*c.n*2,st)); CK(cudaStreamSynchronize(st));
   WgmmaArgs a={units,x,y,nullptr,nullptr,c.m,c.n,c.k,c.k,c.n,ku,1}; if(!launch(v,a,true)) continue; CK(cudaStreamSynchronize(st)); std::vector<u16> h(c.m*c.n); std::vector<double> hr(c.m*c.n),ha(c.m*c.n); CK(cudaMemcpy(h.data(),y,h.size()*2,cudaMemcpyDeviceToHost)); CK(cudaMemcpy(hr.data(),r,hr.size()*8,cudaMemcpyDeviceToHost)); CK(cudaMemcpy(ha.data(),ab,hr.size()*8,cudaMemcpyDeviceToHost)); double e2=0,n2=0,mx=0; for(size_t i=0;i<h.size();++i){ double d=h2f(h[i],false)-hr[i]; e2+=d*d; n2+=hr[i]*hr[i]; double b=fabs(hr[i])/2048+ha[i]*1e-6; mx=std::max(mx,fabs(d)/b); if(!(fabs(d)<1e30)) mx=INFINITY; }
   if(mx<1) good++; else { bad++; printf("BAD %s k%u n%u m%u rel %.2e max/bound %.3f\n",v.name,c.k,c.n,c.m,sqrt(e2/n2),mx); } cudaFree(units);cudaFree(x);cudaFree(y);cudaFree(r);cudaFree(ab); }
 printf("good %d bad %d\n",good,bad);
 struct S{u32 k,n;}; std::vector<S> ss={{4096,4096},{4096,11008},{11008,4096},{8192,28672}};
 for(auto&s:ss) for(u32 M:{16u,64u}){ u32 ku=(s.k+127)/128, stripes=s.n/32; size_t per=(size_t)stripes*ku*2112; u32 copies=std::max<size_t>(8,(560u<<20)/per+1); u8* units; CK(cudaMalloc(&units,per*copies)); u16*x,*y; CK(cudaMalloc(&x,64*s.k*2)); CK(cudaMalloc(&y,64*s.n*2)); for(u32 i=0;i<copies;++i) make_units<<<stripes*ku,128,0,st>>>(units+i*per,i+1,stripes,ku,s.n,s.k,1,false); make_x<Fp16><<<64,256,0,st>>>(x,M,s.k,3);
   std::vector<std::pair<double,std::string>> res;
   for(auto&v:vars){ if(v.N!=M||smem_of(v,ku)>227*1024) continue; WgmmaArgs a={units,x,y,nullptr,nullptr,M,s.n,s.k,s.k,s.n,ku,1}; if(!launch(v,a,true,false)) continue; CK(cudaStreamSynchronize(st)); cudaGraph_t g; cudaGraphExec_t ge; CK(cudaStreamBeginCapture(st,cudaStreamCaptureModeThreadLocal)); for(u32 i=0;i<copies;++i){ a.units=units+i*per; launch(v,a,true);} CK(cudaStreamEndCapture(st,&g)); CK(cudaGraphInstantiate(&ge,g,0)); cudaEvent_t e0,e1; cudaEventCreate(&e0); cudaEventCreate(&e1); std::vector<float> ts; for(int r=0;r<8;++r){ cudaEventRecord(e0,st); CK(cudaGraphLaunch(ge,st)); cudaEventRecord(e1,st); CK(cudaStreamSynchronize(st)); float ms; cudaEventElapsedTime(&ms,e0,e1); if(r>1) ts.push_back(ms*1000/copies);} std::sort(ts.begin(),ts.end()); int occ=0; cudaOccupancyMaxActiveBlocksPerMultiprocessor(&occ,v.f,v.wgs*128,smem_of(v,ku)); char buf[200]; snprintf(buf,200,"%-15s occ%d %.2f us (min %.2f)",v.name,occ,ts[ts.size()/2],ts[0]); res.push_back({ts[ts.size()/2],buf}); cudaGraphExecDestroy(ge); cudaGraphDestroy(g); }
   std::sort(res.begin(),res.end()); printf("== %ux%u M=%u\n",s.k,s.n,M); for(auto&r:res) printf("  %s\n",r.second.c_str()); cudaFree(units); cudaFree(x); cudaFree(y); }
}
