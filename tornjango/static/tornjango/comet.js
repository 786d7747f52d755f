// Made from comet.source.js by bin/_comet_client.py.
const TRANSPORTS=["socket","sse","poll"]
const FIRST_BYTE=3000
const SILENCE=60_000
const FIRST_DELAY=500
const LONGEST_DELAY=30_000
const UPGRADE=10_000
const LAST_UPGRADE=600_000
const LONGEST_QUERY=1500
const MOST_QUEUED=100
const PASSING=[408,425,429]
const RESTARTED=new Error("restarted")
const browser=globalThis
const identifier=()=>Array.from({length:4},()=>Math.random().toString(36).slice(2,8)).join("")
const backOff=failures=>Math.random()*Math.min(LONGEST_DELAY,FIRST_DELAY*2**failures)
const isFinal=({status})=>status>=400&&status<500&&!PASSING.includes(status)
const offline=()=>browser.navigator?.onLine===false
function storage(){
try{return browser.sessionStorage}catch{return null}
}
function report(error){
browser.reportError?reportError(error):console.error(error)
}
function failure(message,detail){
return Object.assign(new Error(message),detail)
}
async function refusal(response){
const{error,channels}=await response.json().catch(()=>({}))
const{status,statusText,headers}=response
const retryAfter=1000*headers.get("Retry-After")||0
return failure(error??`${status} ${statusText}`,{status,channels,retryAfter})
}
function parameters(channels,options){
const given=Object.entries(options).filter(([,value])=>value!=null)
return new URLSearchParams([...[...channels].map(channel=>["channel",channel]),...given])
}
async function poll(url,query,signal){
const options={signal,cache:"no-store",headers:{Accept:"application/json"}}
const long=`${query}`.length>LONGEST_QUERY
const response=await fetch(long?url:`${url}?${query}`,long?{...options,method:"POST",body:query}:options)
if(!response.ok)throw await refusal(response)
return response.json()
}
class Feed{
status="connecting"
channels=new Set()
at={}
facts={transport:null,tries:0,error:null,roundTrip:null,buffering:false}
#h=0
#d=0
#t=new Set()
#n=new Map()
#ak=0
#u=false
#p=false
#v
#al=()=>{}
constructor(address,{transports,timeout,client},{cursor,at={},epoch,grant},{heard,told,refused}){
Object.assign(this,{address,transports,timeout,client,cursor,at,epoch,grant,heard,told,refused})
this.origin=Object.keys(at).length?null:cursor
this.key=`comet ${address("")}`
this.#d=this.#w()
}
follow(channels){
const added=channels.filter(channel=>!this.channels.has(channel))
const left=[...this.channels].filter(channel=>!channels.includes(channel))
this.channels=new Set(channels)
for(const channel of left)delete this.at[channel]
if(!this.#u)return void this.#ba()
if(!added.length&&!left.length)return
if(!this.send||!channels.length)return this.restart()
if(left.length)this.send({leave:left})
if(added.length)this.#am(added)
}
close(){
this.#p=true
this.restart()
}
restart(){
this.abort?.(RESTARTED)
this.wake()
}
wake(){this.#al()}
async #ba(){
this.#u=true
while(this.channels.size&&!this.#p){
const delay=offline()?Infinity:await this.#bb()
if(delay&&!this.#p)await this.#bc(delay)
}
this.#u=false
}
#x(time){
clearTimeout(this.#v)
this.#v=setTimeout(()=>this.abort?.(failure("nothing came",{silent:true})),time)
}
#bc(delay){
this.#e("waiting",{delay})
return new Promise(resolve=>{
const timer=delay<Infinity&&setTimeout(resolve,delay)
this.#al=()=>{clearTimeout(timer);resolve()}
})
}
async #bb(){
const kind=this.transports[this.#d]
const control=new AbortController()
const last=this.#d===this.transports.length-1
const began=performance.now()
this.abort=reason=>control.abort(reason)
this.#x(kind==="poll"?this.timeout:FIRST_BYTE)
this.answered=()=>{
this.answered=()=>{}
this.#h=0
this.trouble=null
if(kind!=="poll")this.facts.roundTrip=Math.round(performance.now()-began)
if(this.facts.transport!==kind)this.#bd(kind)
if(this.#d&&kind!=="poll")this.upgrade=setTimeout(()=>this.#an(),this.until-Date.now())
this.#e("open")
}
this.retry=0
this.facts.tries++
try{
await{socket:this.#be,sse:this.#bf,poll:this.#bg}[kind].call(this,control.signal)
if(kind==="poll"&&this.#d&&Date.now()>this.until)this.#an()
return this.retry||(kind==="poll"?0:backOff(0))
}catch(error){
if(error===RESTARTED)return 0
if(this.retry)return this.retry
const{refused,silent,retryAfter=0}=this.facts.error=this.trouble=error
const opened=this.facts.transport===kind
if(silent&&!opened&&kind!=="poll")this.facts.buffering=true
if(refused||last&&isFinal(error))return this.#bh()
if(!last&&!opened&&!retryAfter)return void this.#d++
this.facts.transport=null
this.#d=this.#w()
return retryAfter+backOff(this.#h++)
}finally{
clearTimeout(this.#v)
clearTimeout(this.upgrade)
this.send=this.abort=null
}
}
#w(){
const[kind,until,pause]=JSON.parse(storage()?.getItem(this.key)??"[]")
this.until=until??0
this.pauseBetween=pause??0
return Date.now()<this.until?Math.max(0,this.transports.indexOf(kind)):0
}
#bd(kind){
this.facts.transport=kind
this.pauseBetween=this.#d&&Math.min(LAST_UPGRADE,this.pauseBetween*2||UPGRADE)
this.until=Date.now()+this.pauseBetween
storage()?.setItem(this.key,JSON.stringify([kind,this.until,this.pauseBetween]))
}
#an(){
this.#d=0
this.facts.transport=null
this.restart()
}
#ao(more){
return parameters(this.channels,{cursor:this.cursor,grant:this.grant,client:this.client,...more})
}
async #bg(signal){
this.#ap(await poll(this.address("poll/"),this.#ao(),signal))
}
async #bf(signal){
const options={signal,cache:"no-store",headers:{Accept:"text/event-stream"}}
const response=await fetch(`${this.address("sse/")}?${this.#ao()}`,options)
if(!response.ok)throw await refusal(response)
const reader=response.body.pipeThrough(new TextDecoderStream()).getReader()
for(let text="",part;!(part=await reader.read()).done;){
const events=(text+part.value).split("\n\n")
text=events.pop()
this.#x(this.timeout)
for(const event of events){
const data=/^data:\s?(.*)/m.exec(event)?.[1]
if(data)this.#aq(JSON.parse(data))
}
}
}
#be(signal){
return new Promise((resolve,reject)=>{
const url=`${this.address("socket/")}`.replace("http","ws")
const socket=new WebSocket(`${url}?${parameters([], {client: this.client})}`)
signal.onabort=()=>{reject(signal.reason);socket.close()}
socket.onopen=()=>{
this.send=frame=>socket.send(JSON.stringify(frame))
this.#am([...this.channels])
}
socket.onmessage=({data})=>{
if(signal.aborted)return
try{this.#aq(JSON.parse(data))}catch(error){this.abort(error)}
}
socket.onclose=({code,reason})=>reject(failure(`the WebSocket was closed: ${code} ${reason}`))
}).finally(()=>{
for(const{reject}of this.#n.values())reject(failure("the connection was lost: it may be published, or not"))
this.#n.clear()
})
}
#am(channels){
this.send({follow:channels,cursor:this.cursor??undefined,grant:this.grant??undefined})
}
publish(message){
return new Promise((resolve,reject)=>{
this.#n.set(++this.#ak,{resolve,reject})
this.send({publish:message,id:this.#ak})
})
}
#aq(frame){
this.#x(this.timeout)
if("published" in frame){
const{resolve,reject}=this.#n.get(frame.published)
this.#n.delete(frame.published)
frame.error?reject(failure(frame.error,{status:frame.status,retryAfter:frame.retry??0})):resolve()
}else if("error" in frame)throw failure(frame.error,{status:frame.status,retryAfter:frame.retry,refused:isFinal(frame)})
else this.#ap(frame)
}
#ap(answer){
const{cursor,grant,at={},epoch,retry,messages}=answer
this.answered()
this.retry=retry
const gaps=[...new Set([...answer.gaps,...this.#t])]
this.#t.clear()
const from=epoch===this.epoch?this.at:{}
const origin=this.origin
if(Object.keys(at).length)this.origin=null
Object.assign(this,{cursor,at,epoch,grant:grant??this.grant})
this.heard({...answer,grant:this.grant,messages,gaps,at,from,origin})
}
get state(){
const{cursor,at,epoch,grant,client}=this
return{messages:[],offsets:[],gaps:[],cursor,at,epoch,grant,client,from:at}
}
async #bh(){
this.#d=this.#w()
const channels=[...this.channels]
const error=await this.#y(channels)
if(!error)return backOff(1)
if(!isFinal(error))return error.retryAfter+backOff(this.#h++)
if(error.status===400&&this.cursor&&await this.#y(channels.slice(0,1)))return this.#bi()
const refused=[]
for(const channel of channels){
const own=await this.#y([channel])
if(own&&isFinal(own))refused.push([channel,own])
}
for(const[channel,own]of refused)this.#bj(channel,own)
if(refused.length)return 0
this.refused([],error)
return backOff(this.#h++)
}
#y(channels){
const query=parameters(channels,{cursor:this.cursor,grant:this.grant,wait:0})
return poll(this.address("poll/"),query).then(()=>null,error=>({retryAfter:0,...error,message:error.message}))
}
#bj(channel,error){
this.channels.delete(channel)
delete this.at[channel]
this.refused([channel],error)
}
#bi(){
this.cursor=this.grant=this.origin=null
this.at={}
for(const channel of this.channels)this.#t.add(channel)
return 0
}
#e(status,detail={}){
if(this.#p||this.status===status&&status!=="waiting")return
this.status=status
this.told(status,{...detail,error:this.trouble})
}
}
class Tabs{
wants=new Map()
leads=false
#ar=false
#as=[]
#at=new AbortController()
constructor(name,identifier,{lead,hear,changed}){
Object.assign(this,{name,identifier,hear,changed})
const left=new Promise(resolve=>{this.release=resolve})
this.channel=new BroadcastChannel(name)
this.channel.onmessage=({data})=>this.#z(data)
this.#aa(identifier,()=>{this.#ar=true;this.#e();return left})
this.#aa("lead",()=>{this.leads=true;lead();this.post({lead:true});return left})
}
want(channels){
this.#as=channels
this.#e()
}
post(news){this.channel.postMessage(news)}
leave(){
this.#at.abort()
this.release()
this.channel.close()
}
#e(){
if(this.#ar&&!this.leads)this.post({want:this.#as,from:this.identifier})
}
#z(news){
const{lead,want,from}=news
if(lead)return this.#e()
if(!want)return this.hear(news)
if(!this.leads)return
if(!this.wants.has(from))this.#aa(from,()=>{this.wants.delete(from);this.changed()})
this.wants.set(from,want)
this.changed()
}
#aa(what,action){
const{signal}=this.#at
const given=()=>signal.aborted?null:action()
navigator.locks.request(`${this.name} ${what}`,{signal},given).catch(error=>signal.aborted||report(error))
}
}
export class Comet{
onstatus=null
#g
#o
#au=identifier()
#i="connecting"
#av=new AbortController()
#b=new Map()
#j=new Map()
#k=new Map()
#q
#aw
#f=[]
#ab=false
#h=0
#bq=false
#ac=false
#a=null
#c=null
#l={client:this.#au}
#ax={}
constructor(url,{transports=TRANSPORTS,timeout=SILENCE,shared=true,csrfCookie="csrftoken",cursor,grant}={}){
const given=JSON.parse(url==null&&document.querySelector("script[data-comet]")?.textContent||"{}")
url??=given.urls?.poll?.replace(/poll\/$/,"")??"/comet/"
this.#g={transports,timeout,shared,csrfCookie,cursor:cursor??given.cursor}
this.#l.grant=grant
const base=new URL(url.replace(/\/*$/,"/"),browser.location?.href)
this.#o=path=>new URL(path,base)
const heed=(event,action)=>browser.addEventListener?.(event,action,{signal:this.#av.signal})
const wake=()=>{this.#a?this.#a.wake():this.#m({wake:true})}
for(const event of["online","offline"])heed(event,()=>this.#a?.restart())
heed("focus",wake)
heed("visibilitychange",()=>document.hidden||wake())
heed("pagehide",()=>this.#ad())
heed("pageshow",({persisted})=>persisted&&this.#ae())
}
get cursor(){return this.#aw??this.#g.cursor??null}
get status(){return this.#i}
on(channel,callback,{gap,refused,event}={}){
if(this.#i==="closed")throw new Error("This Comet is closed; make a new one.")
const followers=this.#b.get(channel)
this.#b.set(channel,[...(followers??[]),{callback,gap,refused,event}])
if(!this.#j.has(channel))this.#j.set(channel,this.#g.cursor)
if(!followers)this.#ae()
return this
}
off(channel,callback){
const left=(this.#b.get(channel)??[]).filter(follower=>callback&&follower.callback!==callback)
if(left.length)this.#b.set(channel,left)
else this.#ay(channel)
return this
}
close(){
this.#av.abort()
this.#b.clear()
this.#f.length=0
this.#ad()
this.#e("closed")
}
publish(channel,data,event=null){
const message={channel,event,data}
return this.#a?.send?this.#a.publish(message):this.#bk(message)
}
diagnostics(){
const{transport=null,tries=0,error=null,roundTrip=null,buffering=false,tabs=1}=this.#a?this.#af:this.#ax
return{status:this.#i,transport,tries,error,roundTrip,buffering,tabs,leads:this.#a!==null}
}
get #af(){
const{error,...facts}=this.#a.facts
return{...facts,error:error?.message??null,tabs:1+(this.#c?.wants.size??0)}
}
async #bk(message){
const headers={"Content-Type":"application/json","X-CSRFToken":this.#az??""}
const response=await fetch(this.#o("publish/"),{method:"POST",headers,body:JSON.stringify(message)})
if(!response.ok)throw await refusal(response)
}
get #az(){
const pairs=(browser.document?.cookie??"").split("; ").map(pair=>pair.split("="))
return pairs.find(([name])=>name===this.#g.csrfCookie)?.[1]
}
#ay(channel){
this.#k.delete(channel)
this.#j.set(channel,null)
if(this.#b.delete(channel))this.#ae()
}
#ae(){
if(this.#ac)return
this.#ac=true
queueMicrotask(()=>{
this.#ac=false
if(this.#a)this.#r()
else if(this.#c||this.#b.size)this.#bl()
})
}
#bl(){
const{locks}=browser.navigator??{}
if(!this.#g.shared||!locks||!browser.BroadcastChannel)return this.#ag()
this.#c??=new Tabs(`${this.#o("")} ${this.#az}`,this.#au,{
lead:()=>this.#ag(),hear:news=>this.#z(news),changed:()=>this.#r(),
})
this.#c.want([...this.#b.keys()])
}
#ad(){
if(this.#a){
const{cursor,at,epoch,grant}=this.#a
Object.assign(this.#l,{cursor,at,epoch,grant})
this.#a.close()
}
this.#c?.leave()
this.#a=this.#c=null
}
#ag(){
const{cursor=this.#g.cursor,client}=this.#l
this.#a=new Feed(this.#o,{...this.#g,client},{...this.#l,cursor},{
heard:answer=>{
this.#m({answer:{...answer,client}})
this.#ah(answer)
},
told:(status,detail)=>{
this.#m({status,detail,facts:this.#af})
this.#e(status,detail)
},
refused:(channels,error)=>{
const others=this.#c?.wants.size
this.#m({refused:channels,error})
if(channels.length||!others)this.#ai(channels.length?channels:[...this.#b.keys()],error)
else{this.#c.wants.clear();this.#r()}
},
})
this.#r()
}
#r(){
const feed=this.#a
if(!feed)return
const wanted=this.#c?[...this.#c.wants.values()].flat():[]
feed.follow([...new Set([...this.#b.keys(),...wanted])])
this.#m({status:feed.status,facts:this.#af})
if(!Object.keys(feed.at).length)return
this.#m({answer:feed.state})
this.#ah(feed.state)
}
#m(news){this.#c?.post(news)}
#z({answer,status,detail,facts,refused,error,wake}){
if(wake)this.#a?.wake()
if(answer){
const{cursor,at,epoch,grant,client}=answer
if(!this.#a)this.#l={cursor,at,epoch,grant,client}
this.#ah(answer)
}
if(status&&!this.#a){
this.#ax=facts
this.#e(status,detail)
}
if(refused?.length)this.#ai(refused,error)
else if(refused&&!this.#a){
this.#ad()
this.#g.shared=false
this.#ag()
}
}
#ah(answer){
this.#f.push(answer)
if(this.#f.length>MOST_QUEUED)this.#f.splice(1,this.#f.length-2)
if(!this.#ab)this.#bm()
}
async #bm(){
this.#ab=true
while(this.#f.length){
const[answer]=this.#f
const behind=this.#bn(answer)
if(behind.length){
await this.#bo(behind[0],answer)
if(this.#q===answer.epoch||this.#f.length<2)continue
}else this.#aj(answer)
this.#f.shift()
}
this.#ab=false
}
#bn({at={},from,epoch,gaps,origin}){
return Object.keys(at).filter(channel=>{
if(!this.#b.has(channel)||gaps.includes(channel))return false
const seen=this.#k.get(channel)
const place=this.#j.get(channel)
if(seen===undefined)return place&&place!==origin
return epoch!==this.#q||!(seen>=at[channel]||from[channel]<=seen)
})
}
async #bo(channel,{at,epoch}){
const cursor=this.#j.get(channel)
try{
const answer=await poll(this.#o("poll/"),parameters([channel],{cursor,grant:this.#l.grant,wait:0}))
this.#aj(answer)
this.#h=0
if(answer.more||answer.at[channel]>=at[channel])return
}catch(error){
if(error.status===400&&cursor)return this.#aj({messages:[],gaps:[channel],at:{[channel]:at[channel]},epoch})
if(isFinal(error))return this.#ai([channel],error)
}
await new Promise(resolve=>setTimeout(resolve,backOff(this.#h++)))
}
#aj({messages,offsets=[],gaps,at={},epoch,cursor}){
for(const channel of gaps)this.#bp(channel,at[channel])
messages.forEach(({channel,event,data},index)=>{
if(offsets[index]<=this.#k.get(channel))return
for(const follower of this.#b.get(channel)??[])
if(!follower.event||follower.event===event)this.#s(follower.callback,data,{channel,event})
})
for(const channel of Object.keys(at).filter(channel=>this.#b.has(channel))){
this.#k.set(channel,epoch===this.#q?Math.max(at[channel],this.#k.get(channel)??0):at[channel])
this.#j.set(channel,cursor)
}
this.#q=epoch
if([...this.#b.keys()].every(channel=>channel in at))this.#aw=cursor
}
#bp(channel,offset){
const followers=this.#b.get(channel)
if(!followers)return
this.#k.set(channel,offset)
const told=followers.filter(({gap})=>gap)
if(!told.length)console.warn(`comet: messages of ${channel} were lost, and no gap callback is there`)
for(const{gap}of told)this.#s(gap,channel)
}
#ai(channels,error){
for(const channel of channels){
const followers=this.#b.get(channel)??[]
const told=followers.filter(({refused})=>refused)
if(followers.length&&!told.length)console.error(`comet: ${channel} is followed no longer: ${error.message}`)
for(const{refused}of told)this.#s(refused,error,channel)
this.#ay(channel)
}
}
#s(callback,...details){
if(this.#i==="closed")return
try{
callback(...details)
}catch(error){
report(error)
}
}
#e(status,detail={}){
if(this.#i==="closed"||this.#i===status&&status!=="waiting")return
if(this.onstatus&&status!=="closed")this.#s(this.onstatus,status,detail)
this.#i=status
if(status==="closed")this.onstatus?.(status,detail)
}
}
